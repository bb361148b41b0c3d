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

from benchmarks import methods, scores, trainings
from benchmarks.learning import learning
from benchmarks.methods import Suite
from vesselrl.experiment.config import TrainConfig

# How well each method sees: strength of its noise; RL is made the best, so that a hypothesis can hold.
NOISE = {"base": 3.6, "sft": 3.6, "sft_cldice": 3.7, "unet": 4.0, "frangi": 5.0, "rl": 0.7, "sft_rl": 0.8}
# Added to its logits: supervised then PPO misses vessels, so that its recall is not that of all.
BIAS = {"sft_rl": -3.0}
# These see nothing in the middle of an image, so that no closing of gaps mends what they break.
BLIND = ("sft", "sft_cldice")
SIZE = 48
RUN_NUMBERS = itertools.count()


def write_published(root: Path) -> Path:
    """8 train_* and 6 test_* images of drawn crosses, dark on bright, with their masks."""
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


def see(method: str, seed: int) -> Callable[[np.ndarray], SimpleNamespace]:
    """The predictor of a method: it knows dark pixels, through smooth noise, and sees only the image."""

    def predict(image: np.ndarray) -> SimpleNamespace:
        rng = np.random.default_rng([seed, int(image.sum())])
        field = ndimage.gaussian_filter(rng.normal(size=image.shape[:2]), 1.0)
        logits = (115 - image[..., 0].astype(float)) / 12 + NOISE[method] * field / field.std()
        if method in BLIND:
            logits[:, 22:26] = -12.0
        values = 1 / (1 + np.exp(-(logits + BIAS.get(method, 0.0))))
        return SimpleNamespace(mask=values > 0.5, probabilities=values.astype(np.float32))

    return predict


def load_predictor(run: Path | None) -> Callable[[np.ndarray], SimpleNamespace]:
    """In place of a model: the predictor of the run's method."""
    method, _, seed = ("base", "", 1) if run is None else run.parent.name.rpartition("_seed")
    return see(method, int(seed))


class PretendedTraining:
    """In place of the subprocess: writes the few files of a run that the benchmark reads."""

    def __init__(self) -> None:
        self.trained: list[str] = []  # names of folders, as they were asked for
        self.resumed: list[Path] = []  # runs to go on with
        self.failing: set[str] = set()  # these end with exit code 3
        self.killed: set[str] = set()  # these leave a run folder without its last file
        self.num_passes: dict[str, int] = {}

    def __call__(self, arguments: list[str], log_file: Path) -> int:
        if arguments[1] == "--resume_from":
            run = Path(arguments[2])
            settings = json.loads((run / "config.json").read_text())["args"]
            self.resumed.append(run)
        else:
            words = dict(zip(arguments[1::2], arguments[2::2], strict=True))
            settings = TrainConfig().to_dict()
            for name, word in words.items():
                settings[name[2:]] = (
                    type(settings[name[2:]])(word) if settings[name[2:]] is not None else word
                )
            run = Path(settings["output_dir"]) / f"sa2va_lora_ppo_20261122_{next(RUN_NUMBERS):06d}"
            run.mkdir()
            (run / "config.json").write_text(json.dumps({"args": settings}))
        name = run.parent.name
        self.trained.append(name)
        log_file.write_text("first line\nthe last words\n")
        if name in self.failing or name in self.killed:
            return 3 * (name in self.failing)
        counts = json.loads(Path(settings["split_file"]).read_text())["counts"]
        counts = json.loads(Path(settings["split_file"]).read_text())["counts"]
        info = {
            "args": settings | {"num_passes": self.num_passes.get(name, settings["num_passes"])},
            "counts": {"train": {"used": counts["train"]}},
            "total_steps": 0 if settings["control"] == "frangi" else 4,
            "provenance": {"git_commit": "0123456789abcdef", "device": "cpu", "cpu_count": 2},
        }
        (run / "training_info.json").write_text(json.dumps(info))
        return 0


@pytest.fixture(scope="session")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """The data set as the suite `synthetic`, one file dropped; no training takes place, no model predicts."""
    root = write_published(tmp_path_factory.mktemp("published") / "data")
    options = {"num_epochs": 2, "num_passes": 3}
    suite = Suite("synthetic", "made images", options, {}, str(root), 3, ("train_002",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.SUITES, "synthetic", suite)
        patch.setattr(trainings, "run_command", PretendedTraining())
        patch.setattr(scores, "load_predictor", load_predictor)
        yield suite


@pytest.fixture(scope="session")
def finished(pretended: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two seeds of every method; read only."""
    output = tmp_path_factory.mktemp("finished") / "output"
    assert learning(seeds=2, output_dir=str(output)) == 0
    return output


@pytest.fixture
def training(pretended: Suite, monkeypatch: pytest.MonkeyPatch) -> PretendedTraining:
    """Stands in for the training of one test."""
    stand_in = PretendedTraining()
    monkeypatch.setattr(trainings, "run_command", stand_in)
    return stand_in
