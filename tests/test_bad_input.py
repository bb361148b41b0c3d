"""Bad input to training: one line that names file or record, exit code 1, nothing left behind or damaged."""

import dataclasses
import hashlib
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

from tests.golden.broken_input import CODE, MODELS
from vesselrl.cli import main
from vesselrl.data.pseudonyms import MAPPING_FILE
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder, write_json
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
def refused(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, capsys, caplog, monkeypatch) -> Refused:
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


BAD_MODELS = {
    "no folder": ["Model folder", "model does not exist"],
    "no config": ["model has no config.json"],
    "missing shard": ["lacks 1 of 2 shards", "model-00002-of-00002.safetensors"],
    "truncated": ["model.safetensors cannot be read", "truncated"],
    "no weights": ["model holds no model*.safetensors file"],
    "unknown tensor": ["model does not fit", "1 unknown: bogus"],
    "missing tensor": ["model does not fit", "1 missing: projector.0.weight"],
    "wrong shape": ["model does not fit", "1 wrong shape: mlp1.0.weight (3,)"],
    "config without a field": ["config.json", "vision_config", "hidden_size"],
    "damaged config": ["config.json is not valid JSON"],
    "side-car with a word": ["sam2_config.json has image_size = '128 px'"],
    "index without shards": ["model.safetensors.index.json has no `weight_map`"],
    "no tokenizer": ["model lacks the tokenizer files vocab.json"],
    "damaged tokenizer": ["model: the tokenizer files cannot be used"],
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_model_folder(refused: Refused, tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    MODELS[kind](folder)
    line = refused(model_path=folder)
    assert str(folder) in line or "sam2_config.json" in line
    assert [word for word in BAD_MODELS[kind] if word not in line] == []


@pytest.fixture
def data(angiograms: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(angiograms, tmp_path / "data"))


def pictures(data: Path, folder: str) -> list[Path]:
    return sorted((data / folder).iterdir())


def lose_an_image(data: Path) -> None:
    """annotations.json in place of the mask files, with a record whose image is missing."""
    shutil.rmtree(data / "masks")
    square = [[10, 10, 20, 10, 20, 40, 10, 40]]
    records = [{"image": path.name, "mask": square, "text": "vessel"} for path in pictures(data, "images")]
    write_json(data / "annotations.json", records)
    pictures(data, "images")[3].unlink()


def cut_an_image(data: Path) -> None:
    """Its header is whole, so only reading all of it shows the damage; that is done before training."""
    file = pictures(data, "images")[4]
    file.write_bytes(file.read_bytes()[:-2000])


def empty(paths: list[Path]) -> None:
    for path in paths:
        Image.fromarray(np.zeros((64, 64), bool)).save(path)


BAD_DATA = {
    "no root": (shutil.rmtree, r"The data root \S+data is not a folder"),
    "no annotations": (
        lambda data: shutil.rmtree(data / "masks"),
        r"\S+data holds no annotations: neither annotations.json nor masks/",
    ),
    "missing image": (
        lose_an_image,
        r"annotations.json record 3 \(P\d{3}_S1_F0001\): its image is missing in images/",
    ),
    "mask of another size": (
        lambda data: Image.fromarray(np.ones((32, 64), bool)).save(pictures(data, "masks")[2]),
        r"images/ file 3 in name order \(P\d{3}_S1_F0000\): the mask has 64×32 px",
    ),
    "image that ends too early": (
        cut_an_image,
        r"images/ file 5 in name order \(P\d{3}_S1_F0000\): image: the file is damaged",
    ),
    "empty masks": (lambda data: empty(pictures(data, "masks")), "All 20 masks are empty"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data(refused: Refused, data: Path, kind: str) -> None:
    spoil, words = BAD_DATA[kind]
    spoil(data)
    assert re.search(words, refused(data_root=data, max_train_samples=20))


def test_some_masks_empty_is_a_warning(data: Path, tmp_path: Path, caplog) -> None:
    empty(pictures(data, "masks")[:3])
    prepared = prepare_data(TrainConfig.from_dict({"data_root": str(data)}), RunFolder.create(tmp_path))
    assert prepared.counts["found"] == 20
    assert "data check: empty mask: 3" in caplog.text
    assert not PERSON.search(caplog.text)


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
def test_reward_function(refused: Refused, tmp_path: Path, monkeypatch, function: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in CODE.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert BAD_FUNCTIONS[function] in refused(reward_fn=function)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--reward_type best", ["'best'", "multi_objective", "simple_dice", "recall_focused"]),
        ("--num_samples 1", ["--num_samples is 1; give at least 2."]),
    ],
)
def test_wrong_usage_exits_with_2(capsys, tmp_path: Path, words: str, said: list[str]) -> None:
    assert main(["train", *words.split(), "--output_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert [word for word in said if word not in err] == []
    assert list(tmp_path.iterdir()) == []


OTHER_BASES = {
    "fewer blocks": ({"blocks_per_stage": (1, 1, 1, 1), "global_attention_blocks": (2,)}, "does not have"),
    "wider": ({"embed_dim_per_stage": (16, 32, 64, 128)}, "size mismatch"),
}


@pytest.mark.parametrize("kind", OTHER_BASES)
def test_adapter_of_another_base(refused: Refused, finished_run: Path, tmp_path: Path, kind: str) -> None:
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


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BAD_ADAPTERS = {
    "truncated": (lambda a: (a / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0{"), f"{WEIGHTS} cannot be read"),
    "half": (drop_a_tensor, f"{WEIGHTS} does not fit its {CONFIG}: 1 tensors missing"),
    "no type": (lambda a: (a / CONFIG).write_text("{}"), f"{CONFIG} describes no LoRA"),
    "no adapter": (lambda a: (a / CONFIG).unlink(), f"adapter has no {CONFIG}"),
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


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_output_folder_is_a_file(refused: Refused, tmp_path: Path, below: str) -> None:
    file = tmp_path / "results"
    file.write_text("kept")
    assert str(file) in refused(output_dir=file / below)
    assert file.read_text() == "kept"


BAD_SETTINGS = {
    "recall_target": (85, "recall_target must be between 0 and 1, got 85"),
    "patient_pattern": ("(", "patient_pattern is not a regular expression"),
    "lora_scope": (
        "everything",
        "LoRA scope ['everything'] is not usable; choose one or more of language_model, projector,",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_is_looked_at_before_model_and_data(refused: Refused, name: str) -> None:
    value, words = BAD_SETTINGS[name]
    nowhere = {} if name == "patient_pattern" else {"model_path": "nowhere", "data_root": "nowhere"}
    assert words in refused(**nowhere, **{name: value})


def test_wandb_is_asked_for_and_absent(refused: Refused, monkeypatch) -> None:
    monkeypatch.setattr("vesselrl.training.logging.find_spec", lambda name: None)
    assert "--use_wandb needs the package wandb" in refused(use_wandb=True)


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_learning_rate_of_0_is_no_success(refused: Refused, stage: str) -> None:
    line = refused(may_have_begun=True, learning_rate=0, stage=stage)
    assert "the adapter has moved by 0.0" in line
    assert "--learning_rate (0 teaches nothing" in line


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


def test_the_traceback_is_there_for_whoever_asks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VESSELRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not a folder"):
        main(["train", "--data_root", str(tmp_path / "x"), "--output_dir", str(tmp_path / "y")])
