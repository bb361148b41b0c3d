"""A small published data set, and trainings that only pretend, for the tests of the learning benchmark."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from benchmarks import scores, trainings
from benchmarks.learning import learning
from benchmarks.trainings import Suite
from vesselrl.experiment.config import TrainConfig

# How well each method sees: strength of its noise; RL is made the best, so that a hypothesis can hold.
NOISE = {"base": 3.6, "sft": 3.6, "sft_cldice": 3.7, "unet": 4.0, "frangi": 5.0, "rl": 0.7, "sft_rl": 0.8}
BIAS = {"sft_rl": -3.0}  # added to its logits: it misses vessels, so that its recall is not that of all
BLIND = ("sft", "sft_cldice")  # see nothing in the middle of an image, where no closing of gaps mends it
SIZE = 48


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 train_* and 6 test_* images of drawn crosses, dark on bright, with their masks."""
    root = tmp_path_factory.mktemp("published") / "data"
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, half in enumerate(["train"] * 8 + ["test"] * 6, start=1):
        mask = np.zeros((SIZE, SIZE), bool)
        row, column = rng.integers(8, 36, 2)
        mask[row : row + 3, 3:45] = mask[4:44, column : column + 3] = True
        grey = np.where(mask, 70, 160) + rng.integers(-20, 20, mask.shape)
        name = f"{half}_{number:03d}.png"
        Image.fromarray(grey.astype(np.uint8)).convert("RGB").save(root / "images" / name)
        Image.fromarray(mask).save(root / "masks" / name)
    return root


def load_predictor(run: Path | None) -> Callable[[np.ndarray], SimpleNamespace]:
    """In place of a model: it knows dark pixels, through smooth noise, and sees only the image."""
    method, _, seed = ("base", "", 1) if run is None else run.parent.name.rpartition("_seed")

    def predict(image: np.ndarray) -> SimpleNamespace:
        rng = np.random.default_rng([int(seed), int(image.sum())])
        field = ndimage.gaussian_filter(rng.normal(size=image.shape[:2]), 1.0)
        logits = (115 - image[..., 0].astype(float)) / 12 + NOISE[method] * field / field.std()
        if method in BLIND:
            logits[:, 22:26] = -12.0
        values = 1 / (1 + np.exp(-(logits + BIAS.get(method, 0.0))))
        return SimpleNamespace(probabilities=values.astype(np.float32))

    return predict


class PretendedTraining:
    """In place of the subprocess: writes the few files of a run that the benchmark reads."""

    def __init__(self) -> None:
        self.trained: list[str] = []  # names of folders, as they were asked for
        self.resumed: list[Path] = []  # runs to go on with
        self.failing: set[str] = set()  # these end with exit code 3
        self.killed: set[str] = set()  # these leave a run folder without its last file
        self.numbers = itertools.count()

    def __call__(self, arguments: list[str], log_file: Path) -> int:
        words = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if run := words.get("--resume_from"):
            run = Path(run)
            self.resumed.append(run)
        else:
            assert {name[2:] for name in words} <= set(TrainConfig().to_dict())
            run = Path(words["--output_dir"]) / f"sa2va_lora_ppo_20261122_{next(self.numbers):06d}"
            run.mkdir()
        name = run.parent.name
        self.trained.append(name)
        log_file.write_text("first line\nthe last words\n")
        if name in self.failing or name in self.killed:
            return 3 * (name in self.failing)
        origin = {"git_commit": "0123456789abcdef", "device": "cpu", "cpu_count": 2}
        (run / "training_info.json").write_text(json.dumps({"provenance": origin}))
        return 0


@pytest.fixture(scope="session")
def pretended(published: Path) -> Iterator[None]:
    """The data set as the suite `synthetic`, one file dropped; no training takes place, no model predicts."""
    suite = Suite("made synthetic images", 2, 250, {}, 3, ["train_002"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trainings.SUITES, "synthetic", suite)
        patch.setattr(trainings, "run_command", PretendedTraining())
        patch.setattr(scores, "load_predictor", load_predictor)
        yield


@pytest.fixture(scope="session")
def finished(pretended: None, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two seeds of every method; read only."""
    output = tmp_path_factory.mktemp("finished") / "output"
    assert learning(seeds=2, output_dir=str(output), data_root=str(published)) == 0
    return output


@pytest.fixture
def training(pretended: None, monkeypatch: pytest.MonkeyPatch) -> PretendedTraining:
    """Stands in for the training of one test."""
    stand_in = PretendedTraining()
    monkeypatch.setattr(trainings, "run_command", stand_in)
    return stand_in
