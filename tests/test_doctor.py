"""vesselrl doctor on healthy and broken machines, model folders and data."""

import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.golden.broken_input import MODELS, change_json, write_angiograms
from vesselrl import doctor


def replace_weights(model: Path) -> None:
    (model / doctor.INDEX).write_text('{"weight_map": {"mlp1.0.weight": "model.safetensors"}}')
    save_file({"something.else": np.zeros(3, np.float32)}, model / "model.safetensors")


ANOTHER = change_json("config.json", lambda config: config["llm_config"].update(hidden_size=6144))
FAULTS = {
    "missing shard": ("weights", MODELS["missing shard"], "00002-of-00002.safetensors is missing"),
    "cut file": ("weights", MODELS["truncated"], "is broken or cut short"),
    "no weights": ("weights", MODELS["no weights"], r"holds no model\*\.safetensors"),
    "damaged index": ("weights", lambda model: (model / doctor.INDEX).write_text("{"), "cannot be read"),
    "file of another model": ("weights", replace_weights, "lacks 1 tensors of the index, first mlp1"),
    "no config": ("config", MODELS["no config"], r"^no config\.json.*llm_config\.hidden_size \d+"),
    "config of another model": ("config", ANOTHER, "llm_config.hidden_size is 6144, the tensors say 48"),
    "no [SEG]": ("tokenizer", lambda model: [path.write_text(path.read_text().replace("[SEG]", "[GES]"))
                                             for path in model.glob("*.json")], r"\[SEG\]"),
    **{f"no {name}": ("tokenizer", lambda model, name=name: (model / name).unlink(), name)
       for name in doctor.TOKENIZER_FILES},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_model_folder_is_named(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    name, spoil, said = FAULTS[kind]
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    checks = doctor.check_model(model)
    assert [check.status for check in checks] == ["ok", "ok", "ok"], doctor.format_report(checks)
    spoil(model)
    (check,) = [check for check in doctor.check_model(model) if check.name == name]
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
    assert [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]] == list(required)
    assert {*required} <= {*doctor.read_pins(repository / "constraints.txt")}


def test_data_is_counted_by_patient_and_a_problem_names_nobody(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_angiograms(root)
    check = doctor.check_data(root)
    assert (check.status, check.detail) == ("ok", "20 images, 10 sequences, 10 patients")
    next((root / "masks").iterdir()).unlink()
    check = doctor.check_data(root)
    assert check.status == "problem"
    assert not re.search(r"\d{10}|ZHANG", doctor.format_report([check]))
