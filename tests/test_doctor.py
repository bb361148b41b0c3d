"""vesselrl doctor on healthy and broken machines, model folders and data."""

import json
import math
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden.broken_input import MODELS, change_json, write_angiograms
from tests.models.conftest import LLM_8B, VISION_8B
from vesselrl import doctor
from vesselrl.cli import main
from vesselrl.models.config import read_config
from vesselrl.models.miniature import write_tokenizer

INDEX = "model.safetensors.index.json"


def replace_weights(model: Path) -> None:
    (model / INDEX).write_text('{"weight_map": {"mlp1.0.weight": "model.safetensors"}}')
    save_file({"something.else": np.zeros(3, np.float32)}, model / "model.safetensors")


def spoil_a_value(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["mlp1.1.weight"][-1, 7] = 3e33
    save_file(tensors, model / "model.safetensors")


OUTSIDE = '{"weight_map": {"a": "../b"}}'
LFS = "version https://git-lfs.github.com/spec/v1\n"
ANOTHER = change_json("config.json", lambda config: config["llm_config"].update(hidden_size=6144))
FAULTS = {
    "missing shard": ("weights", MODELS["missing shard"], "00002-of-00002.safetensors is missing"),
    "cut file": ("weights", MODELS["truncated"], "cannot be read .* truncated"),
    "no weights": ("weights", MODELS["no weights"], r"holds no model\*\.safetensors"),
    "damaged index": ("weights", lambda model: (model / INDEX).write_text("{"), "cannot be read"),
    "file of another model": ("weights", replace_weights, "lacks 1 tensors of the index, first mlp1"),
    "a flipped bit": ("weights", spoil_a_value, r"mlp1\.1\.weight holds values"),
    "a pointer": ("weights", lambda model: (model / "model.safetensors").write_text(LFS),
                  "only a Git LFS pointer"),
    "index that leaves": ("weights", lambda model: (model / INDEX).write_text(OUTSIDE),
                          r"names '\.\./b', which is no file"),
    "no config": ("config", MODELS["no config"], r"^no config\.json.*llm_config\.hidden_size \d+"),
    "config of another model": ("config", ANOTHER, "llm_config.hidden_size is 6144, the tensors say 48"),
    "no [SEG]": ("tokenizer", lambda model: [path.write_text(path.read_text().replace("[SEG]", "[GES]"))
                                             for path in model.glob("*.json")], r"\[SEG\]"),
    **{f"no {name}": ("tokenizer", lambda model, name=name: (model / name).unlink(), name)
       for name in ("vocab.json", "merges.txt", "tokenizer_config.json")},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_model_folder_is_named(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    name, spoil, said = FAULTS[kind]
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    checks = doctor.check_model(model)
    assert [check.status for check in checks] == ["ok", "ok", "ok", "ok"], doctor.format_report(checks)
    spoil(model)
    (check,) = [check for check in doctor.check_model(model) if check.name == name]
    assert check.status == "problem"
    assert re.search(said, check.detail)


def test_large_tensors_are_sampled_at_both_ends_and_a_tokenizer_may_be_one_file(tmp_path: Path) -> None:
    large = np.zeros((300, 1000), np.float32)
    for row, status in ((0, "problem"), (299, "problem"), (150, "problem"), (60, "ok")):
        large[:] = 0
        large[row, 3] = np.nan
        save_file({"vision_model.large": large}, tmp_path / "model.safetensors")
        assert doctor.check_weights(tmp_path)[0].status == status
    tokens = [{"id": k, "content": token} for k, token in enumerate(("[SEG]", "<IMG_CONTEXT>"))]
    whole = {"model": {"vocab": {}, "merges": []}, "added_tokens": tokens}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert doctor.check_tokenizer(tmp_path).status == "ok"


def test_packages_are_those_of_pyproject_and_compared_with_pins(monkeypatch, repository: Path) -> None:
    required = dict.fromkeys(doctor.required_packages(), "1.0")

    def look_up(name: str) -> str:
        if not installed.get(name):
            raise doctor.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.metadata, "version", look_up)
    for changes, status, said in (
        ({}, "ok", ""),
        ({"peft": "0.9"}, "warning", "peft 0.9 (pinned 1.0)"),
        ({"peft": "0.9", "tyro": None}, "problem", "tyro"),
    ):
        installed = required | {"torch": "2.13.0+cpu"} | changes
        check = doctor.check_packages(required | {"torch": "2.13.0"})
        assert check.status == status
        assert said in check.detail
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]] == list(required)
    assert {*required} <= {*doctor.read_pins(repository / "constraints.txt")}


def test_data_is_counted_by_patient_and_a_problem_names_nobody(tmp_path: Path) -> None:
    write_angiograms(root := tmp_path / "data")
    check = doctor.check_data(root)
    assert (check.status, check.detail) == ("ok", "20 images, 10 sequences, 10 patients")
    for path in [path for path in root.rglob("*.png") if "ZHANG_SANA" not in path.name]:
        path.unlink()
    report = doctor.format_report([check := doctor.check_data(root)])  # it cannot be split
    assert (check.status, "1 patients" in report) == ("problem", True)
    assert not re.search(r"\d{10}|ZHANG", report)
    assert doctor.check_data(tmp_path / "nowhere").status == "problem"


def sparse_8b(folder: Path, names: dict[str, list[int]]) -> None:
    """Two files with all tensors of these shapes in bfloat16 and holes for their data, and their index."""
    index, files = {}, [dict(list(names.items())[k::2]) for k in range(2)]
    for number, tensors in enumerate(files, start=1):
        header, end = {}, 0
        for name, shape in tensors.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        file = folder / f"model-0000{number}-of-00002.safetensors"
        with file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
        index |= dict.fromkeys(tensors, file.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


def test_every_tensor_of_the_8b_has_its_place_and_its_config_is_rebuilt(
    shared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """16.4 GB that take no room on the disk; the user's folder has no config.json."""
    table = json.loads((shared_folder / "design" / "keymap_internvl3_8b.json").read_text())
    names = {name: row["shape"] for name, row in table.items()}
    write_tokenizer(tmp_path)
    sparse_8b(tmp_path, names)
    model = ["doctor", "--model_path", str(tmp_path), "--output_dir", str(tmp_path)]
    assert main(model) == 1
    assert "no config.json" in capsys.readouterr().out
    assert main([*model, "--write_config"]) == 0, capsys.readouterr().out
    assert main(model) == 0
    shown = capsys.readouterr().out
    assert "1589 names: 0 missing, 0 unknown, 0 of a wrong shape; 157 are for videos only" in shown
    config = read_config(tmp_path)
    assert (config.llm | LLM_8B, config.vision | VISION_8B) == (config.llm, config.vision)
    sparse_8b(tmp_path, {name: shape for name, shape in list(names.items())[:2]})
    assert main(model) == 1
    assert re.search(r"\d+ missing: .*a language model alone, or SAMTok", capsys.readouterr().out)
