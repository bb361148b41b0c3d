"""vesselrl doctor on healthy and broken machines, model folders and data."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden.broken_input import change_json, cut, write_angiograms
from vesselrl import doctor

FIRST, SECOND = SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.fixture
def model_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A complete checkpoint folder of two shards."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: SHARDS[name.startswith("language_model.")] for name in tensors}
    for shard in SHARDS:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / doctor.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def test_a_complete_model_folder_is_ok(model_folder: Path, tiny_checkpoint: Path) -> None:
    for folder, num_files in ((model_folder, 2), (tiny_checkpoint, 1)):
        checks = doctor.check_model(folder)
        assert [check.status for check in checks] == ["ok", "ok", "ok"], doctor.format_report(checks)
        assert f"{num_files} files, " in doctor.format_report(checks)
    shapes = doctor.check_weights(tiny_checkpoint)[1]
    config, inferred = json.loads((tiny_checkpoint / "config.json").read_text()), doctor.infer_config(shapes)
    assert len(inferred) == 8
    for name, value in inferred.items():
        section, field = name.split(".")
        assert config[section][field] == value, name


CHANGED = change_json("config.json", lambda config: config["llm_config"].update(hidden_size=6144))
OTHER = {"something.else": np.zeros(3, np.float32)}
FAULTS = {
    "missing shard": ("weights", SECOND, Path.unlink, "is missing"),
    "cut shard": ("weights", FIRST, cut, "is broken or cut short"),
    "shard of another model": ("weights", FIRST, lambda path: save_file(OTHER, path),
                               r"lacks \d+ tensors of the index, first grounding_encoder\."),
    "damaged index": ("weights", doctor.INDEX, lambda path: path.write_text("{"), "cannot be read"),
    "no weights": ("weights", "", lambda path: [one.unlink() for one in path.glob("model*")],
                   r"holds no model\*\.safetensors"),
    "no config": ("config", "config.json", Path.unlink, r"^no config\.json.*llm_config\.hidden_size \d+"),
    "config of another model": ("config", "", CHANGED, "llm_config.hidden_size is 6144, the tensors say 48"),
    "no [SEG]": ("tokenizer", "", lambda folder: [path.write_text(path.read_text().replace("[SEG]", "[GES]"))
                                                  for path in folder.glob("*.json")], r"\[SEG\]"),
} | {f"no {name}": ("tokenizer", name, Path.unlink, name) for name in doctor.TOKENIZER_FILES}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_model_folder_is_named(model_folder: Path, kind: str) -> None:
    name, file, spoil, said = FAULTS[kind]
    spoil(model_folder / file)
    (check,) = [check for check in doctor.check_model(model_folder) if check.name == name]
    assert check.status == "problem"
    assert re.search(said, check.detail)


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
    pins = doctor.read_pins(repository / "constraints.txt")
    assert [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]] == list(required)
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} - set(pins) == set()


def test_disk_space_is_measured_where_output_will_be(tmp_path: Path, monkeypatch) -> None:
    for free, status in ((0.2e9, "problem"), (5e9, "warning"), (50e9, "ok")):
        space = {tmp_path: SimpleNamespace(free=free)}
        monkeypatch.setattr(doctor.shutil, "disk_usage", space.__getitem__)
        assert doctor.check_disk(tmp_path / "not" / "yet").status == status
    (tmp_path / "output").write_text("")
    assert doctor.check_disk(tmp_path / "output").status == "problem"


def test_data_is_counted_by_patient_and_a_problem_names_nobody(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_angiograms(root)
    check = doctor.check_data(root)
    assert (check.status, check.detail) == ("ok", "20 images, 10 sequences, 10 patients")
    for path in [path for path in root.rglob("*.png") if "ZHANG_SANA" not in path.name]:
        path.unlink()
    check = doctor.check_data(root)  # it cannot be split
    assert check.status == "problem"
    assert "1 patients" in check.detail
    next((root / "masks").iterdir()).unlink()
    check = doctor.check_data(root)
    assert check.status == "problem"
    assert not re.search(r"\d{10}|ZHANG", doctor.format_report([check]))
