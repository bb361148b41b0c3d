"""Bad input to training: one line that names file or record, exit code 1, nothing left behind or damaged."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from vesselrl.cli import main
from vesselrl.data.pseudonyms import MAPPING_FILE
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.models.miniature import DEBUG_CONFIG, random_sa2va, write_miniature
from vesselrl.training.setup import prepare_data

# Name and ID of the people in the `angiograms` fixture.
PERSON = re.compile(r"ZHANG|SAN[A-J]|123456789\d")
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")
EARLIER = "sa2va_lora_ppo_20200101_000000/training_info.json"

Refused = Callable[..., str]


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder and the SHA-256 of its content; the list of pseudonyms is ours to write."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MAPPING_FILE)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def refused(
    tiny_checkpoint: Path,
    angiograms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """Trains with these options, checks how that failed and what it left, and returns the message."""
    monkeypatch.delenv("VESSELRL_TRACEBACK", raising=False)
    output = tmp_path / "output"
    (output / EARLIER).parent.mkdir(parents=True)
    (output / EARLIER).write_text("{}")

    def train(may_have_begun: bool = False, **changes: object) -> str:
        options = {"model_path": tiny_checkpoint, "data_root": angiograms, "output_dir": output} | changes
        inputs = [Path(value) for value in options.values() if Path(str(value)).is_dir() and value != output]
        before = [digests(folder) for folder in inputs]
        words = [str(w) for name, value in options.items() for w in (f"--{name}", value) if w is not True]
        code = main(["train", "--preset", "debug", *words])
        out, err = capsys.readouterr()
        assert code == 1, err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert "Traceback" not in out + err
        assert not PERSON.search(out + err + caplog.text)
        assert [digests(folder) for folder in inputs] == before
        left = sorted(digests(output))
        assert not [name for name in left if "partial" in name or ".tmp" in name]
        assert (output / EARLIER).read_text() == "{}"
        if not may_have_begun:
            assert left == [EARLIER]
        return line

    return train


# ---- The model folder


def lose_a_shard(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    half = {name: f"model-0000{1 + (k % 2)}-of-00002.safetensors" for k, name in enumerate(sorted(names))}
    first = {name: names[name] for name, file in half.items() if "00001" in file}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": half}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


BAD_MODELS = {
    "no folder": (shutil.rmtree, ["Model folder", "model does not exist"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["model has no config.json"]),
    "missing shard": (lose_a_shard, ["lacks 1 of 2 shards", "model-00002-of-00002.safetensors"]),
    "truncated": (truncate, ["model.safetensors cannot be read", "truncated"]),
    "no weights": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        ["model holds no model*.safetensors file"],
    ),
    "unknown tensor": (
        lambda m: change_tensors(m, lambda t: t.update(bogus=t["mlp1.0.weight"].clone())),
        ["model does not fit", "1 unknown: bogus"],
    ),
    "missing tensor": (
        lambda m: change_tensors(m, lambda t: t.pop("mlp1.0.weight")),
        ["model does not fit", "1 missing: projector.0.weight"],
    ),
    "wrong shape": (
        lambda m: change_tensors(m, lambda t: t.update({"mlp1.0.weight": t["mlp1.0.weight"][:3].clone()})),
        ["model does not fit", "1 wrong shape: mlp1.0.weight (3,)"],
    ),
    "config without a field": (
        lambda m: change_json(m / "config.json", lambda c: c["vision_config"].pop("hidden_size")),
        ["config.json", "vision_config", "hidden_size"],
    ),
    "damaged config": (lambda m: (m / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "side-car with a word": (
        lambda m: change_json(m / "sam2_config.json", lambda c: c.update(image_size="128 px")),
        ["sam2_config.json has image_size = '128 px'"],
    ),
    "index without shards": (
        lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        ["model.safetensors.index.json has no `weight_map`"],
    ),
    "no tokenizer": (lambda m: (m / "vocab.json").unlink(), ["model lacks the tokenizer files vocab.json"]),
    "damaged tokenizer": (
        lambda m: (m / "vocab.json").write_text('{"a":'),
        ["model: the tokenizer files cannot be used"],
    ),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_model_folder(refused: Refused, tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    spoil, words = BAD_MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    spoil(folder)
    line = refused(model_path=folder)
    assert str(folder) in line or "sam2_config.json" in line
    for word in words:
        assert word in line


# ---- Data


@pytest.fixture
def data(angiograms: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(angiograms, tmp_path / "data"))


def write_records(data: Path) -> list[dict]:
    """annotations.json in place of the mask files; one square per image."""
    shutil.rmtree(data / "masks")
    names = sorted(path.name for path in (data / "images").iterdir())
    records = [
        {"image": name, "mask": [[10, 10, 20, 10, 20, 40, 10, 40]], "text": "vessel"} for name in names
    ]
    (data / "annotations.json").write_text(json.dumps(records))
    return records


def save_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path)


def test_no_data_root(refused: Refused, tmp_path: Path) -> None:
    assert f"The data root {tmp_path / 'nowhere'} is not a folder" in refused(data_root=tmp_path / "nowhere")


def test_no_annotations(refused: Refused, data: Path) -> None:
    shutil.rmtree(data / "masks")
    assert f"{data} holds no annotations: neither annotations.json nor masks/" in refused(data_root=data)


def test_missing_image(refused: Refused, data: Path) -> None:
    records = write_records(data)
    (data / "images" / records[3]["image"]).unlink()
    line = refused(data_root=data)
    assert re.search(r"annotations.json record 3 \(P\d{3}_S1_F0001\): its image is missing in images/", line)


def test_mask_of_another_size(refused: Refused, data: Path) -> None:
    save_mask(sorted((data / "masks").iterdir())[2], np.ones((32, 64), bool))
    line = refused(data_root=data)
    assert re.search(r"images/ file 3 in name order \(P\d{3}_S1_F0000\): the mask has 64×32 px", line)


def test_image_that_ends_too_early(refused: Refused, data: Path) -> None:
    """Its header is whole, so only reading all of it shows the damage; that is done before training."""
    file = sorted((data / "images").iterdir())[4]
    file.write_bytes(file.read_bytes()[:-2000])
    line = refused(data_root=data, max_train_samples=20)
    assert re.search(r"images/ file 5 in name order \(P\d{3}_S1_F0000\): image: the file is damaged", line)


def test_all_masks_empty(refused: Refused, data: Path) -> None:
    for path in (data / "masks").iterdir():
        save_mask(path, np.zeros((64, 64), bool))
    assert "All 20 masks are empty" in refused(data_root=data)


def test_some_masks_empty_is_a_warning(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in sorted((data / "masks").iterdir())[:3]:
        save_mask(path, np.zeros((64, 64), bool))
    prepared = prepare_data(TrainConfig.from_dict({"data_root": str(data)}), RunFolder.create(tmp_path))
    assert prepared.counts["found"] == 20
    assert "data check: empty mask: 3" in caplog.text
    assert not PERSON.search(caplog.text)


# ---- The reward


FUNCTIONS = """
def fails(pred, gt):
    return 1 / 0

def answers(pred, gt):
    return "good"

number = 3
"""
BAD_FUNCTIONS = {
    "my_reward:fails": "custom reward fails failed with ZeroDivisionError: division by zero",
    "my_reward:answers": "custom reward answers must return a finite number, got 'good'",
    "my_reward:absent": "my_reward has no function 'absent'",
    "my_reward:number": "my_reward has no function 'number'",
    "my_reward": "--reward_fn is 'my_reward'; give it as package.module:function",
    "no_such_module:f": "--reward_fn no_such_module:f: the module cannot be imported",
    "broken_module:f": "--reward_fn broken_module:f: the module cannot be imported (NameError",
}


@pytest.mark.parametrize("function", BAD_FUNCTIONS)
def test_reward_function(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in (("my_reward", FUNCTIONS), ("broken_module", "undefined_name")):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert BAD_FUNCTIONS[function] in refused(reward_fn=function)


def test_unknown_reward_type_names_the_choices(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    code = main(["train", "--reward_type", "best", "--output_dir", str(tmp_path)])
    err = capsys.readouterr().err
    assert code == 2
    assert "'best'" in err
    for name in ("multi_objective", "simple_dice", "recall_focused"):
        assert name in err
    assert list(tmp_path.iterdir()) == []


# ---- Adapters


def test_init_lora_that_is_no_adapter(refused: Refused, angiograms: Path) -> None:
    assert f"{angiograms} has no adapter_config.json" in refused(init_lora=angiograms)


OTHER_BASES = {
    "fewer blocks": ({"blocks_per_stage": (1, 1, 1, 1), "global_attention_blocks": (2,)}, "does not have"),
    "wider": ({"embed_dim_per_stage": (16, 32, 64, 128)}, "size mismatch"),
}


@pytest.mark.parametrize("kind", OTHER_BASES)
def test_adapter_of_another_base_model(
    refused: Refused, finished_run: Path, tmp_path: Path, kind: str
) -> None:
    changes, words = OTHER_BASES[kind]
    sam2 = dataclasses.replace(DEBUG_CONFIG.sam2, **changes)
    config = dataclasses.replace(DEBUG_CONFIG, sam2=sam2)
    write_miniature(tmp_path / "other", random_sa2va(config=config))
    line = refused(model_path=tmp_path / "other", init_lora=finished_run / "final_lora")
    assert str(finished_run / "final_lora") in line
    assert words in line


def drop_a_tensor(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors")


BAD_ADAPTERS = {
    "truncated": (
        lambda a: (a / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        "adapter_model.safetensors cannot be read",
    ),
    "half": (
        drop_a_tensor,
        "adapter_model.safetensors does not fit its adapter_config.json: 1 tensors missing",
    ),
    "no type": (
        lambda a: (a / "adapter_config.json").write_text("{}"),
        "adapter_config.json describes no LoRA",
    ),
}


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_damaged_adapter(refused: Refused, finished_run: Path, tmp_path: Path, kind: str) -> None:
    spoil, words = BAD_ADAPTERS[kind]
    adapter = Path(shutil.copytree(finished_run / "best_lora", tmp_path / "adapter"))
    spoil(adapter)
    line = refused(init_lora=adapter)
    assert str(adapter) in line
    assert words in line


def test_split_of_the_start_belongs_to_other_data(refused: Refused, finished_run: Path, data: Path) -> None:
    for folder in ("images", "masks"):
        sorted((data / folder).iterdir())[0].unlink()
    assert "data_split.json" in refused(init_lora=finished_run, data_root=data)


# ---- Settings and the output folder


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_output_folder_is_a_file(refused: Refused, tmp_path: Path, below: str) -> None:
    file = tmp_path / "results"
    file.write_text("kept")
    assert str(file) in refused(output_dir=file / below)
    assert file.read_text() == "kept"


def test_lora_scope_is_looked_at_before_model_and_data(refused: Refused) -> None:
    line = refused(lora_scope="everything", model_path="nowhere", data_root="nowhere")
    assert "LoRA scope ['everything'] is not usable; choose one or more of language_model, projector," in line


BAD_SETTINGS = {
    "recall_target": (85, "recall_target must be between 0 and 1, got 85"),
    "patient_pattern": ("(", "patient_pattern is not a regular expression"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_setting(refused: Refused, name: str) -> None:
    value, words = BAD_SETTINGS[name]
    assert words in refused(**{name: value})


def test_a_setting_out_of_range_is_wrong_usage(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["train", "--num_samples", "1", "--output_dir", str(tmp_path)]) == 2
    assert "--num_samples is 1; give at least 2." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_asked_for_and_absent(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesselrl.training.logging.find_spec", lambda name: None)
    assert "--use_wandb needs the package wandb" in refused(use_wandb=True)


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_learning_rate_of_0_is_no_success(refused: Refused, stage: str) -> None:
    line = refused(may_have_begun=True, learning_rate=0, stage=stage)
    assert "the adapter has moved by 0.0" in line
    assert "--learning_rate (0 teaches nothing" in line


# ---- As a user sees it


def test_in_a_process_of_its_own(repository: Path, angiograms: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vesselrl", "train", "--model_path", tmp_path / "model"]
    command += ["--data_root", angiograms, "--output_dir", tmp_path / "output"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    *log, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert last.startswith(f"error: Model folder {tmp_path / 'model'} does not exist")
    assert all(LOG_LINE.match(line) for line in log)
    assert not PERSON.search(done.stdout + done.stderr)
    assert list((tmp_path / "output").iterdir()) == []


def test_the_traceback_is_there_for_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESSELRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not a folder"):
        main(["train", "--data_root", str(tmp_path / "x"), "--output_dir", str(tmp_path / "y")])
