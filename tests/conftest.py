"""What every test may rely on: no network, few threads, no window for plots."""

import os

# Before torch, transformers or matplotlib is imported anywhere.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
os.environ |= {"MPLBACKEND": "Agg", "WANDB_MODE": "disabled"}
os.environ.setdefault("OMP_NUM_THREADS", "2")

import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("vesselrl", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vesselrl")


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Optional real data beside the clone; a test that asks for it is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture(autouse=True)
def no_runs_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clone may have runs in output/, whose newest is taken where no model is named."""
    monkeypatch.setattr("vesselrl.cli.RUNS", Path("no such folder"))


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
            raise RuntimeError(f"A test tried to reach {address[0]}; tests must not need a network.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature Sa2VA in the official layout, for 64-px images; tests must not write into it."""
    from vesselrl.models.miniature import random_sa2va, write_miniature

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_miniature(folder, random_sa2va(seed=3))
    return folder


@pytest.fixture(scope="session")
def angiograms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of 10 patients with two 64-px frames each, under names as exports carry them; read only."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("angiograms")
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for patient in range(10):
        for frame in range(2):
            mask = np.zeros((64, 64), bool)
            row = 8 + 4 * patient + 2 * frame
            mask[row : row + 4, 4:60] = mask[row : row + 20, 28:32] = True
            image = np.where(mask, 70, 160) + rng.integers(-20, 20, mask.shape)
            stem = f"ZHANG_SAN{'ABCDEFGHIJ'[patient]}(123456789{patient})_1-2_3_0A1B2C3D_frame_{frame:06d}"
            Image.fromarray(image.astype(np.uint8)).convert("RGB").save(root / "images" / f"{stem}.png")
            Image.fromarray(mask).save(root / "masks" / f"{stem}.png")
    return root


@pytest.fixture(scope="session")
def finished_run(tiny_checkpoint: Path, angiograms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short supervised training whose best adapter is not the first one; read only."""
    from vesselrl.experiment.config import PRESETS
    from vesselrl.training.train import train

    output = tmp_path_factory.mktemp("output")
    config = PRESETS["debug"].with_(
        model_path=str(tiny_checkpoint), data_root=str(angiograms), output_dir=str(output),
        stage="sft", num_epochs=2, learning_rate=0.02, max_train_samples=None, val_freq=100,
    )  # fmt: skip
    return train(config, ["vesselrl", "train"]).folder
