"""A small published data set, and trainings that only pretend, for the tests of the learning benchmark."""

import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vesselrl import cli
from vesselrl.benchmarks import learning_arms, learning_runner, learning_scores
from vesselrl.benchmarks.learning import LearningResult, benchmark_learning
from vesselrl.benchmarks.learning_arms import Suite
from vesselrl.experiment.config import TrainConfig

# How well each arm sees: strength of its noise; RL arms are made the best, so that a claim can hold.
NOISE = {"base": 3.6, "sft": 3.6, "sft_cldice": 3.7, "unet": 4.0, "frangi": 5.0, "rl": 0.7, "sft_rl": 0.8}
# What is added to its logits: supervised then PPO misses vessels, so that its recall is not that of all.
BIAS = {"sft_rl": -3.0}
# Arms that see nothing in the middle of an image, so that no closing of gaps mends what they break.
BLIND = ("sft", "sft_cldice")
SIZE = 48
RUN_NUMBERS = itertools.count()
PARSING = threading.Lock()  # the parser is not made for threads


def write_published(root: Path, seed: int = 0) -> Path:
    """8 train_* and 6 test_* images of drawn crosses, dark on bright, with their masks."""
    rng = np.random.default_rng(seed)
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


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data root of `write_published`; read only."""
    return write_published(tmp_path_factory.mktemp("published") / "data")


def see(arm: str, seed: int) -> Callable[[np.ndarray], SimpleNamespace]:
    """The predictor of an arm: it knows dark pixels, through smooth noise, and sees nothing but the image."""

    def predict(image: np.ndarray) -> SimpleNamespace:
        rng = np.random.default_rng([seed, int(image.sum())])
        field = ndimage.gaussian_filter(rng.normal(size=image.shape[:2]), 1.0)
        logits = (115 - image[..., 0].astype(float)) / 12 + NOISE[arm] * field / field.std()
        if arm in BLIND:
            logits[:, 22:26] = -12.0
        values = 1 / (1 + np.exp(-(logits + BIAS.get(arm, 0.0))))
        return SimpleNamespace(mask=values > 0.5, probabilities=values.astype(np.float32))

    return predict


class PretendedTraining:
    """In place of the subprocess: writes the few files of a run that the benchmark reads.

    `trained` has the arms in the order they were asked for, `resumed` the run folders to go on with; an arm
    in `failing` ends with exit code 3, one in `killed` leaves a run folder without its last file.
    """

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.resumed: list[Path] = []
        self.failing: set[str] = set()
        self.killed: set[str] = set()
        self.num_passes: dict[str, int] = {}

    def __call__(self, arguments: list[str], log_file: Path) -> int:
        if arguments[1] == "--resume_from":
            run = Path(arguments[2])
            config = TrainConfig.from_dict(json.loads((run / "config.json").read_text())["args"])
            self.resumed.append(run)
        else:
            with PARSING:
                config = cli.parse(TrainConfig, arguments[1:], "train")
            run = Path(config.output_dir) / f"sa2va_lora_ppo_20261122_{next(RUN_NUMBERS):06d}"
            run.mkdir()
            (run / "config.json").write_text(json.dumps({"args": config.to_dict()}))
        name = run.parent.name
        self.trained.append(name)
        log_file.write_text("first line\nthe last words\n")
        if name in self.failing:
            return 3
        if name in self.killed:
            return 0
        split = json.loads(Path(config.split_file).read_text())
        info = {
            "args": config.to_dict() | {"num_passes": self.num_passes.get(name, config.num_passes)},
            "counts": {"train": {"used": split["counts"]["train"]}},
            "total_steps": 0 if config.control == "frangi" else 4,
            "provenance": {"git_commit": "0123456789abcdef", "device": "cpu", "cpu_count": 2},
        }
        (run / "training_info.json").write_text(json.dumps(info))
        return 0


@pytest.fixture(scope="session")
def pretended(published: Path) -> Iterator[Suite]:
    """The data set as the suite `synthetic`, one file dropped; no training takes place, no model predicts."""
    suite = Suite("synthetic", "made images", str(published), num_val_patients=3, dropped=("train_002",),
                  settings={"num_epochs": 2, "num_passes": 3})  # fmt: skip

    def load_predictor(run: Path) -> Callable:
        arm, _, seed = run.parent.name.rpartition("_seed")
        return see(arm, int(seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(learning_arms.SUITES, "synthetic", suite)
        patch.setattr(learning_runner, "run_training", PretendedTraining())
        patch.setattr(learning_scores, "load_predictor", load_predictor)
        patch.setattr(learning_scores, "make_predictor", lambda plan, settings: see("base", 1))
        yield suite


@pytest.fixture(scope="session")
def finished(pretended: Suite, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LearningResult]:
    """Output folder and result of two seeds of every arm; read only."""
    output = tmp_path_factory.mktemp("finished") / "output"
    return output, benchmark_learning("synthetic", 2, output, argv=["vesselrl", "bench", "learning"])


@pytest.fixture
def output(finished: tuple[Path, LearningResult], tmp_path: Path) -> Path:
    """A copy of the finished output folder."""
    return shutil.copytree(finished[0], tmp_path / "output")


@pytest.fixture
def training(pretended: Suite, monkeypatch: pytest.MonkeyPatch) -> PretendedTraining:
    """Stands in for the training of one test."""
    stand_in = PretendedTraining()
    monkeypatch.setattr(learning_runner, "run_training", stand_in)
    return stand_in
