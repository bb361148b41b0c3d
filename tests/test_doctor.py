"""vesselrl doctor on healthy and broken machines, model folders and data."""

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
    "vision_model.encoder.layers.0.mlp.fc1.weight": (96, 48),
    "vision_model.encoder.layers.1.mlp.fc1.weight": (96, 48),
    LLM + "embed_tokens.weight": (362, 64),
    LLM + "layers.0.mlp.gate_proj.weight": (112, 64),
    LLM + "layers.1.mlp.gate_proj.weight": (112, 64),
    LLM + "layers.2.mlp.gate_proj.weight": (112, 64),
}
INFERRED = {
    "vision_config.hidden_size": 48,
    "vision_config.patch_size": 14,
    "vision_config.intermediate_size": 96,
    "vision_config.num_hidden_layers": 2,
    "llm_config.vocab_size": 362,
    "llm_config.hidden_size": 64,
    "llm_config.intermediate_size": 112,
    "llm_config.num_hidden_layers": 3,
}


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
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    vision |= {"image_size": 56, "patch_size": 14}
    llm = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3}
    llm |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 112, "vocab_size": 362}
    write(folder / "config.json", {"vision_config": vision, "llm_config": llm})
    return folder


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Three invented patients with one sequence of two frames each, as images and masks of the same stem."""
    root = tmp_path / "data"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    picture, mask = np.full((16, 16), 90, np.uint8), np.zeros((16, 16), np.uint8)
    mask[4:8] = 255
    for patient in range(3):
        for frame in range(2):
            stem = f"MUSTER{patient}_100000000{patient}__1-1_1_ABCDEF12_frame_00000{frame}"
            Image.fromarray(picture + 20 * patient + frame).save(root / "images" / f"{stem}.png")
            Image.fromarray(mask).save(root / "masks" / f"{stem}.png")
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
    config = json.loads(path.read_text())
    config["llm_config"]["hidden_size"] = 6144
    write(path, config)


FAULTS = {
    "missing shard": ("weights", "model-00002-of-00002.safetensors", Path.unlink, "is missing"),
    "cut shard": ("weights", "model-00001-of-00002.safetensors", truncate, "is broken or cut short"),
    "shard of another model": (
        "weights",
        "model-00001-of-00002.safetensors",
        lambda path: save_file({"something.else": np.zeros(3, np.float32)}, path),
        "lacks 3 tensors of the index, first vision_model.",
    ),
    "damaged index": ("weights", doctor.INDEX, lambda path: path.write_text("{"), "cannot be read"),
    "config of another model": (
        "config", "config.json", change_hidden_size, "llm_config.hidden_size is 6144, the tensors say 64",
    ),
    "no [SEG]": (
        "tokenizer", "added_tokens.json", lambda path: write(path, {"<IMG_CONTEXT>": 350}), "[SEG]",
    ),
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


def test_fields_are_inferred_from_shapes() -> None:
    assert doctor.infer_config(TENSORS) == INFERRED
    assert doctor.infer_config({}) == {}


def test_inferred_fields_agree_with_a_real_config(shared_folder: Path) -> None:
    reference = shared_folder / "sa2va-reference"
    check, shapes = doctor.check_weights(reference)
    config = json.loads((reference / "config.json").read_text())
    assert check.status == "ok"
    for name, value in doctor.infer_config(shapes).items():
        section, field = name.split(".")
        assert config[section][field] == value, name


def test_a_folder_that_does_not_exist_is_one_problem(tmp_path: Path) -> None:
    checks = doctor.check_model(tmp_path / "nowhere")
    assert [check.status for check in checks] == ["problem"]


def test_packages_are_compared_with_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = dict.fromkeys(doctor.required_packages(), "1.0") | {"torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: look_up(installed, name))
    pins = dict.fromkeys(installed, "1.0") | {"torch": "2.13.0"}
    assert doctor.check_packages(pins).status == "ok"

    installed["peft"] = "0.9"
    other = doctor.check_packages(pins)
    assert other.status == "warning"
    assert "peft 0.9 (pinned 1.0)" in other.detail

    del installed["tyro"]
    lacking = doctor.check_packages(pins)
    assert lacking.status == "problem"
    assert "tyro" in lacking.detail


def look_up(installed: dict[str, str], name: str) -> str:
    if name not in installed:
        raise doctor.metadata.PackageNotFoundError(name)
    return installed[name]


def test_the_packages_are_those_of_pyproject_and_all_pinned(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pins = doctor.read_pins(repository / "constraints.txt")
    assert [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]] == doctor.required_packages()
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} - set(pins) == set()
    assert not {"torchvision", "timm"} & set(pins)


@pytest.mark.parametrize(("free", "status"), [(0.2e9, "problem"), (5e9, "warning"), (50e9, "ok")])
def test_disk_space_is_measured_where_output_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: str
) -> None:
    space = {tmp_path: SimpleNamespace(free=free)}
    monkeypatch.setattr(doctor.shutil, "disk_usage", space.__getitem__)
    assert doctor.check_disk(tmp_path / "not" / "yet").status == status


def test_an_output_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("")
    assert doctor.check_disk(tmp_path / "output").status == "problem"


def test_data_is_counted_by_patient(data_folder: Path) -> None:
    check = doctor.check_data(data_folder)
    assert check.status == "ok", check.detail
    assert check.detail == "6 images, 3 sequences, 3 patients"


def test_data_of_one_patient_cannot_be_split(data_folder: Path) -> None:
    for path in [path for path in data_folder.rglob("*.png") if "MUSTER0" not in path.name]:
        path.unlink()
    check = doctor.check_data(data_folder)
    assert check.status == "problem"
    assert "1 patients" in check.detail


def test_a_data_folder_without_images_is_a_problem(tmp_path: Path) -> None:
    check = doctor.check_data(tmp_path)
    assert check.status == "problem"


def test_names_and_ids_do_not_reach_the_report(data_folder: Path) -> None:
    next((data_folder / "masks").iterdir()).unlink()
    report = doctor.format_report([doctor.check_data(data_folder)])
    assert not re.search(r"\d{10}", report)
    assert "MUSTER" not in report


def test_diagnose_leaves_out_what_was_not_given(tmp_path: Path) -> None:
    names = [check.name for check in doctor.diagnose(output_dir=tmp_path)]
    assert names == ["python", "packages", "processor", "gpu", "disk"]


def test_the_report_has_one_line_per_check_and_problems_set_the_exit_code() -> None:
    checks = [
        Check("a", "ok", "fine"),
        Check("b", "warning", "slow", "Wait."),
        Check("c", "problem", "broken", "Mend it."),
    ]
    lines = doctor.format_report(checks).splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("broken -> Mend it.")
