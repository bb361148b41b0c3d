"""Handing an adapter to a hub and taking it from there, with a folder in the place of the hub."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

from vesselrl.cli import main
from vesselrl.experiment.run_folder import run_settings, write_json
from vesselrl.inference.predictor import Predictor
from vesselrl.models.lora import adapter_settings


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the hub: what is committed lies there, and is downloaded from there."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, library_name: str) -> None: ...

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> SimpleNamespace:
            (root / name).mkdir(parents=True, exist_ok=exist_ok)
            (root / f"{name}.private").write_text(str(private))
            return SimpleNamespace(repo_id=name)

        def create_commit(self, name: str, operations: list, commit_message: str) -> SimpleNamespace:
            for one in operations:
                with one.as_file() as file:
                    (root / name / one.path_in_repo).write_bytes(file.read())
            return SimpleNamespace(repo_url=f"https://huggingface.co/{name}")

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        others = [f.name for f in (root / name).iterdir() if f.name not in allow_patterns]
        place, leave = tmp_path / "cache", shutil.ignore_patterns(*others)
        return str(shutil.copytree(root / name, place, ignore=leave, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


def test_a_pushed_adapter_predicts_as_its_run_does_and_nothing_of_the_data_goes_up(
    finished_run: Path, angiograms: Path, hub: Path, tmp_path: Path, capsys
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    settings = run_settings(run, may_be_changed=True) | {"close_gaps": 0.25, "prompt": "Where are vessels?"}
    private = (run / "paths.private.json").read_text()
    assert str(angiograms) in private
    write_json(run / "config.json", {"args": settings | {"data_root": "DATA_ROOT"}})
    shutil.copy(run / "paths.private.json", run / "best_lora")
    (run / "best_lora" / "optimizer.bin").write_bytes(b"a pickle")
    assert main(["push", "org/vessels", "--lora_weights", str(run)]) == 0
    assert capsys.readouterr().out == "Uploaded: https://huggingface.co/org/vessels\n"
    files = {file.name: file.read_bytes() for file in (hub / "org" / "vessels").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md", "vesselrl.json"}
    assert b"# Sa2VA adapter for blood vessels" in files["README.md"]
    names = [path.stem.encode() for path in (angiograms / "images").iterdir()]
    secrets = [str(angiograms).encode(), str(tmp_path).encode(), b"ZHANG", b"123456789", *names]
    assert [word for word in secrets if any(word in content for content in files.values())] == []
    assert (hub / "org" / "vessels.private").read_text() == "True"
    kept = {name: settings[name] for name in ("prompt", "tile_px", "min_component_px", "close_gaps")}
    assert adapter_settings("org/vessels") == kept
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    base = settings["model_path"]
    masks = [Predictor.from_pretrained(base, one).predict(image) for one in (run, "org/vessels", None)]
    assert np.array_equal(masks[0].logits, masks[1].logits)
    assert not np.array_equal(masks[0].logits, masks[2].logits)
    words, images = ["--lora_weights", "org/vessels@main", "--base_model", base], str(angiograms / "images")
    assert main(["predict", *words, "--image", images, "--output_dir", str(tmp_path / "out")]) == 0
    assert main(["evaluate", *words, "--data_root", str(angiograms), "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "test_vessels@main.json").is_file()


def test_what_cannot_be_pushed_or_found_is_said(finished_run: Path, tmp_path: Path, capsys) -> None:
    """The hub is out of reach here, as on a machine without a network."""
    weights = ["--lora_weights", str(finished_run)]
    assert main(["push", "org/vessels", *weights]) == 1
    assert "did not take best_lora as org/vessels (Cannot reach" in capsys.readouterr().err
    assert main(["push", "no good name", *weights]) == 1
    assert "Look at the network and the name" in capsys.readouterr().err
    bare = shutil.copytree(finished_run / "best_lora", tmp_path / "bare")
    (bare / "README.md").unlink()
    assert main(["push", "org/vessels", "--lora_weights", str(bare)]) == 2
    assert "has no model card, README.md. `vesselrl evaluate" in capsys.readouterr().err
    assert main(["push", "org/vessels"]) == 2
    assert "push needs --lora_weights" in capsys.readouterr().err
    assert main(["predict", "--lora_weights", "org/vessels", "--image", "x"]) == 2
    said = capsys.readouterr().err
    assert "org/vessels is no folder here" in said
    assert "then give --lora_weights the folder" in said
