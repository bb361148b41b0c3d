"""Bad input to training: one line that names file or record, exit code 2, nothing left behind or damaged.

The golden check has many more of them, but only their exit codes.
"""

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

from tests.golden.broken_input import CODE, MODELS, cut
from vesselrl.cli import main
from vesselrl.data.pseudonyms import MAPPING_FILE
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder, write_json
from vesselrl.models.miniature import DEBUG_CONFIG, random_sa2va, write_miniature
from vesselrl.training.setup import prepare_data

# Name and ID of the people in the `angiograms` fixture.
PERSON = re.compile(r"ZHANG|SAN[A-J]|123456789\d")
EARLIER = "sa2va_lora_ppo_20200101_000000/training_info.json"
WEIGHTS, CONFIG = "best_lora/adapter_model.safetensors", "best_lora/adapter_config.json"
SUMS = "best_lora/SHA256SUMS"


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder and the SHA-256 of its content; the list of pseudonyms is ours to write."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MAPPING_FILE)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def folders(tiny_checkpoint: Path, angiograms: Path, finished_run: Path, tmp_path: Path) -> dict[str, Path]:
    """Copies that may be spoilt, by the option that takes them."""
    sources = {"model_path": tiny_checkpoint, "data_root": angiograms, "init_lora": finished_run}
    return {name: Path(shutil.copytree(source, tmp_path / name)) for name, source in sources.items()}


@pytest.fixture
def refused(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path, capsys, caplog, monkeypatch) -> Callable:
    """Trains with these options, checks how that failed and what it left, and returns the message."""
    monkeypatch.delenv("VESSELRL_TRACEBACK", raising=False)
    output = tmp_path / "output"
    write_json(output / EARLIER, {})
    earlier = digests(output)

    def train(may_have_begun: bool = False, code: int = 2, **changes: object) -> str:
        options = {"model_path": tiny_checkpoint, "data_root": angiograms, "output_dir": output} | changes
        inputs = [Path(value) for value in options.values() if Path(str(value)).is_dir() and value != output]
        before = [digests(folder) for folder in inputs]
        words = [str(w) for name, value in options.items() for w in (f"--{name}", value) if w is not True]
        ended = main(["train", "--preset", "debug", *words])
        out, err = capsys.readouterr()
        assert ended == code, err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert not PERSON.search(out + err + caplog.text)
        assert [digests(folder) for folder in inputs] == before
        left = digests(output)
        assert not [name for name in left if "partial" in name or ".tmp" in name]
        assert left.items() >= earlier.items() if may_have_begun else left == earlier
        return line

    return train


def pictures(data: Path, folder: str) -> list[Path]:
    return sorted((data / folder).iterdir())


def lose_an_image(data: Path) -> None:
    """annotations.json in place of the mask files, with a record whose image is missing."""
    shutil.rmtree(data / "masks")
    square = [[10, 10, 20, 10, 20, 40, 10, 40]]
    records = [{"image": path.name, "mask": square, "text": "vessel"} for path in pictures(data, "images")]
    write_json(data / "annotations.json", records)
    pictures(data, "images")[3].unlink()


def clear_masks(data: Path, num: int = 20, height: int = 64) -> None:
    for path in pictures(data, "masks")[:num]:
        Image.fromarray(np.zeros((height, 64), bool)).save(path)


def drop_a_tensor(run: Path) -> None:
    tensors = load_file(run / WEIGHTS)
    tensors.pop(min(tensors))
    save_file(tensors, run / WEIGHTS)
    (run / SUMS).unlink()


def another_base(**changes: tuple) -> Callable[[Path], None]:
    config = dataclasses.replace(DEBUG_CONFIG, sam2=dataclasses.replace(DEBUG_CONFIG.sam2, **changes))
    return lambda folder: (shutil.rmtree(folder), write_miniature(folder, random_sa2va(config=config)))


BAD_MODELS = {
    "no folder": r"Model folder \S+model_path does not exist",
    "no config": r"model_path has no config\.json",
    "missing shard": r"model_path lacks 1 of 2 shards.*model-00002-of-00002\.safetensors",
    "truncated": r"model_path/model\.safetensors cannot be read.*truncated",
    "no weights": r"model_path holds no model\*\.safetensors file",
    "wrong shape": r"model_path does not fit.*1 wrong shape: mlp1\.0\.weight \(3,\)",
    "config without a field": r"model_path/config\.json.*vision_config.*hidden_size",
    "damaged config": r"model_path/config\.json is not valid JSON",
    "side-car with a word": r"sam2_config\.json has image_size = '128 px'",
    "index without shards": r"model_path/model\.safetensors\.index\.json has no `weight_map`",
    "no tokenizer": r"model_path lacks the tokenizer files vocab\.json",
    "damaged tokenizer": "model_path: the tokenizer files cannot be used",
}
PLACE = r"images/ file {} in name order \(P\d{{3}}_S1_F0000\): "
# The folders given, of which the first is spoilt; how; what is said.
SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    **{f"model: {kind}": ("model_path", MODELS[kind], words) for kind, words in BAD_MODELS.items()},
    "no root": ("data_root", shutil.rmtree, "The data root is not a folder"),
    "no annotations": ("data_root", lambda data: shutil.rmtree(data / "masks"),
                       "The data root holds no annotations: neither annotations.json nor masks/"),
    "missing image": ("data_root", lose_an_image,
                      r"annotations.json record 3 \(P\d{3}_S1_F0001\): its image is missing in images/"),
    "mask of another size": ("data_root", lambda data: clear_masks(data, 1, 32),
                             PLACE.format(1) + "the mask has 64×32 px"),
    # Only reading all of it shows the damage; that is done before training.
    "image that ends too early": ("data_root", lambda data: cut(pictures(data, "images")[4]),
                                  PLACE.format(5) + "image: the file is damaged"),
    "empty masks": ("data_root", clear_masks, "All 20 masks are empty"),
    "truncated adapter": ("init_lora", lambda run: cut(run / WEIGHTS),
                          "best_lora: adapter_model.safetensors is not as it was saved"),
    "half adapter": ("init_lora", drop_a_tensor, f"{WEIGHTS} does not fit its .*: 1 tensors missing"),
    "no adapter type": ("init_lora", lambda run: [(run / CONFIG).write_text("{}"), (run / SUMS).unlink()],
                        f"{CONFIG} describes"),
    "no adapter": ("init_lora", lambda run: (run / CONFIG).unlink(), "best_lora has no adapter_config.json"),
    "adapter for more blocks": ("model_path init_lora", another_base(
        blocks_per_stage=(1, 1, 1, 1), global_attention_blocks=(2,)), "init_lora/best_lora.* does not have"),
    "adapter for a narrower model": ("model_path init_lora", another_base(
        embed_dim_per_stage=(16, 32, 64, 128)), "init_lora/best_lora.*size mismatch"),
    "start with the split of other data": ("data_root init_lora", lambda data: [
        pictures(data, folder)[0].unlink() for folder in ("images", "masks")], "data_split.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_named_and_left_as_it_is(refused: Callable, folders: dict, case: str) -> None:
    given, spoil, words = SPOILT[case]
    names = given.split()
    spoil(folders[names[0]])
    assert re.search(words, refused(**{name: folders[name] for name in names}, max_train_samples=20))


SETTINGS = {
    ("reward_fn", "my_reward:fails"): "custom reward fails failed with ZeroDivisionError: division by zero",
    ("reward_fn", "my_reward:answers"): "custom reward answers must return a finite number, got 'good'",
    ("reward_fn", "broken_module:f"): r"--reward_fn broken_module:f: .* cannot be imported \(NameError",
    ("patient_pattern", "("): "patient_pattern is not a regular expression",
    ("recall_target", 85): "recall_target must be between 0 and 1, got 85",
    ("lora_scope", "everything"): r"LoRA scope \['everything'\] .*; choose one or more of language_model, ",
    ("use_wandb", True): "--report_to wandb needs the package wandb",
    **{("output_dir", below): "results" for below in ("results", "results/deeper/still")},
}


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_bad_setting_is_named(refused: Callable, tmp_path: Path, monkeypatch, name, value) -> None:
    """Some are looked at before model and data."""
    monkeypatch.setattr("vesselrl.training.setup.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("results").write_text("kept")
    for module, code in CODE.items():
        Path(f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
    places = ("model_path", "data_root") if name in ("recall_target", "lora_scope") else ()
    nowhere = dict.fromkeys(places, "nowhere")
    assert re.search(SETTINGS[name, value], refused(**nowhere, **{name: value}))
    assert Path("results").read_text() == "kept"


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_learning_rate_of_0_is_no_success(refused: Callable, stage: str) -> None:
    line = refused(may_have_begun=True, code=1, learning_rate=0, stage=stage)
    assert re.search(r"the adapter has moved by 0\.0.*--learning_rate \(0 teaches nothing", line)


def test_some_masks_empty_is_a_warning(folders: dict, tmp_path: Path, caplog) -> None:
    clear_masks(folders["data_root"], 3)
    config = TrainConfig.from_dict({"data_root": str(folders["data_root"])})
    assert prepare_data(config, RunFolder.create(tmp_path)).counts["found"] == 20
    assert "data check: empty mask: 3" in caplog.text


def test_in_a_process_of_its_own_and_with_a_traceback_for_whoever_asks(
    repository: Path, angiograms: Path, tmp_path: Path, monkeypatch
) -> None:
    words = ["train", "--model_path", str(tmp_path / "model"), "--data_root", str(angiograms)]
    words += ["--output_dir", str(tmp_path / "output")]
    command = [sys.executable, "-m", "vesselrl", *words]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    *log, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert last.startswith(f"error: Model folder {tmp_path / 'model'} does not exist")
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in log)
    assert not PERSON.search(done.stdout + done.stderr)
    assert not (tmp_path / "output").exists()
    monkeypatch.setenv("VESSELRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(words)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_files_of_every_kind_end_in_words(repository: Path) -> None:
    """In a process of its own, which forks before any thread is there."""
    command = [sys.executable, "tests/fuzz.py", "--mutations", "54", "--seed", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
