"""vesselrl doctor on healthy and broken machines, model folders and data."""

import itertools
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vesselrl import doctor
from vesselrl.doctor import Check

LLM = "language_model.model."
TENSORS = {
    "vision_model.embeddings.patch_embedding.weight": (48, 3, 14, 14),
    **{f"vision_model.encoder.layers.{k}.mlp.fc1.weight": (96, 48) for k in range(2)},
    LLM + "embed_tokens.weight": (362, 64),
    **{f"{LLM}layers.{k}.mlp.gate_proj.weight": (112, 64) for k in range(3)},
}
VISION = {"hidden_size": 48, "patch_size": 14, "intermediate_size": 96, "num_hidden_layers": 2}
LANGUAGE = {"vocab_size": 362, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
INFERRED = {f"vision_config.{name}": value for name, value in VISION.items()}
INFERRED |= {f"llm_config.{name}": value for name, value in LANGUAGE.items()}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A complete checkpoint folder of two shards; its tensors are zeros."""
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for number, prefix in enumerate(("vision_model.", "language_model."), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        part = {k: np.zeros(shape, np.float32) for k, shape in TENSORS.items() if k.startswith(prefix)}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write(folder / doctor.INDEX, {"weight_map": weight_map})
    write(folder / "vocab.json", {"a": 0})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write(folder / "tokenizer_config.json", {})
    write(folder / "added_tokens.json", {"<IMG_CONTEXT>": 350, "[SEG]": 357})
    vision = VISION | {"num_attention_heads": 4, "image_size": 56}
    llm = LANGUAGE | {
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    write(folder / "config.json", {"vision_config": vision, "llm_config": llm})
    return folder


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Three invented patients with one sequence of two frames each, as images and masks of the same stem."""
    root = tmp_path / "data"
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8] = 255
    for patient, frame in itertools.product(range(3), range(2)):
        stem = f"MUSTER{patient}_100000000{patient}__1-1_1_ABCDEF12_frame_00000{frame}"
        for name, pixels in (("images", np.full_like(mask, 90 + 20 * patient + frame)), ("masks", mask)):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name / f"{stem}.png")
    return root


def write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def find(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_a_complete_model_folder_is_ok(model_folder: Path) -> None:
    checks = doctor.check_model(model_folder)
    assert [check.status for check in checks] == ["ok", "ok", "ok"], doctor.format_report(checks)
    assert "2 files, 7 tensors" in find(checks, "weights").detail


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-4])


def change_hidden_size(path: Path) -> None:
    path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": 6144'))


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
OTHER = {"something.else": np.zeros(3, np.float32)}
FAULTS = {
    "missing shard": ("weights", SECOND, Path.unlink, "is missing"),
    "cut shard": ("weights", FIRST, truncate, "is broken or cut short"),
    "shard of another model": ("weights", FIRST, lambda path: save_file(OTHER, path),
                               "lacks 3 tensors of the index, first vision_model."),
    "damaged index": ("weights", doctor.INDEX, lambda path: path.write_text("{"), "cannot be read"),
    "config of another model": ("config", "config.json", change_hidden_size,
                                "llm_config.hidden_size is 6144, the tensors say 64"),
    "no [SEG]": ("tokenizer", "added_tokens.json", lambda path: write(path, {"<IMG_CONTEXT>": 350}), "[SEG]"),
} | {f"no {name}": ("tokenizer", name, Path.unlink, name) for name in doctor.TOKENIZER_FILES}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_model_folder_is_named(model_folder: Path, kind: str) -> None:
    name, file, spoil, said = FAULTS[kind]
    spoil(model_folder / file)
    check = find(doctor.check_model(model_folder), name)
    assert check.status == "problem"
    assert said in check.detail


def test_a_single_file_needs_no_index(model_folder: Path) -> None:
    for path in [*model_folder.glob("*.safetensors"), model_folder / doctor.INDEX]:
        path.unlink()
    assert "holds no model*.safetensors" in find(doctor.check_model(model_folder), "weights").detail
    save_file({k: np.zeros(s, np.float32) for k, s in TENSORS.items()}, model_folder / "model.safetensors")
    assert "1 files, 7 tensors" in find(doctor.check_model(model_folder), "weights").detail


def test_without_config_the_shapes_are_reported(model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    check = find(doctor.check_model(model_folder), "config")
    assert check.status == "problem"
    assert check.detail.startswith("no config.json")
    assert [name for name, value in INFERRED.items() if f"{name} {value}" not in check.detail] == []


def test_inferred_fields_agree_with_a_real_config(shared_folder: Path) -> None:
    reference = shared_folder / "sa2va-reference"
    check, shapes = doctor.check_weights(reference)
    config = json.loads((reference / "config.json").read_text())
    assert check.status == "ok"
    for name, value in doctor.infer_config(shapes).items():
        section, field = name.split(".")
        assert config[section][field] == value, name


def test_a_folder_that_does_not_exist_is_one_problem(tmp_path: Path) -> None:
    assert [check.status for check in doctor.check_model(tmp_path / "nowhere")] == ["problem"]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "ok", ""),
        ({"peft": "0.9"}, "warning", "peft 0.9 (pinned 1.0)"),
        ({"peft": "0.9", "tyro": None}, "problem", "tyro"),
    ],
)
def test_packages_are_compared_with_pins(monkeypatch, changes: dict, status: str, said: str) -> None:
    installed = dict.fromkeys(doctor.required_packages(), "1.0") | {"torch": "2.13.0+cpu"} | changes

    def look_up(name: str) -> str:
        if not installed.get(name):
            raise doctor.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.metadata, "version", look_up)
    check = doctor.check_packages(dict.fromkeys(installed, "1.0") | {"torch": "2.13.0"})
    assert check.status == status
    assert said in check.detail


def test_the_packages_are_those_of_pyproject_and_all_pinned(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pins = doctor.read_pins(repository / "constraints.txt")
    assert [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]] == doctor.required_packages()
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} - set(pins) == set()
    assert not {"torchvision", "timm"} & set(pins)


@pytest.mark.parametrize(("free", "status"), [(0.2e9, "problem"), (5e9, "warning"), (50e9, "ok")])
def test_disk_space_is_measured_where_output_will_be(tmp_path: Path, monkeypatch, free, status) -> None:
    space = {tmp_path: SimpleNamespace(free=free)}
    monkeypatch.setattr(doctor.shutil, "disk_usage", space.__getitem__)
    assert doctor.check_disk(tmp_path / "not" / "yet").status == status


def test_an_output_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("")
    assert doctor.check_disk(tmp_path / "output").status == "problem"


def test_data_is_counted_by_patient(data_folder: Path) -> None:
    check = doctor.check_data(data_folder)
    assert (check.status, check.detail) == ("ok", "6 images, 3 sequences, 3 patients")
    for path in [path for path in data_folder.rglob("*.png") if "MUSTER0" not in path.name]:
        path.unlink()
    check = doctor.check_data(data_folder)  # it cannot be split
    assert check.status == "problem"
    assert "1 patients" in check.detail


def test_bad_data_is_a_problem_whose_report_names_nobody(data_folder: Path, tmp_path: Path) -> None:
    next((data_folder / "masks").iterdir()).unlink()
    report = doctor.format_report([doctor.check_data(data_folder)])
    assert not re.search(r"\d{10}", report)
    assert "MUSTER" not in report
    assert doctor.check_data(tmp_path / "nowhere").status == "problem"


def test_diagnose_leaves_out_what_was_not_given(tmp_path: Path) -> None:
    names = [check.name for check in doctor.diagnose(output_dir=tmp_path)]
    assert names == ["python", "packages", "processor", "gpu", "disk"]


def test_the_report_has_one_line_per_check() -> None:
    checks = [Check("a", "ok", "fine"), Check("b", "warning", "slow", "Wait.")]
    lines = doctor.format_report([*checks, Check("c", "problem", "broken", "Mend it.")]).splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("broken -> Mend it.")
