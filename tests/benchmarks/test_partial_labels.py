"""The benchmark of partial labels: its rewards by hand, and what each side is given to learn from."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import partial_labels
from benchmarks.partial_labels import COMMON, METHODS, NUM_LABELLED, REWARDS, area_mask, labels_of, write_root
from vesselrl.data.samples import find_samples, load_mask
from vesselrl.data.splits import Split, split_by_patient
from vesselrl.experiment.config import TrainConfig
from vesselrl.scoring.rewards import make_reward

LINE = np.zeros((30, 30), bool)
LINE[10, 5:25] = True  # 20 px


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """24 images of dark bars of 3 px, each longer than the one before, of one patient each."""
    root = tmp_path_factory.mktemp("bars")
    for number in range(24):
        mask = np.zeros((48, 48), bool)
        mask[20:23, 4 : 16 + number] = True
        grey = np.where(mask, 60, 160) + np.random.default_rng(number).integers(-40, 40, mask.shape)
        for folder, pixels in (("images", grey.astype(np.uint8)), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")
    return split_by_patient(find_samples(root), 42, (0.5, 0.25, 0.25))


def score(suite: str, pred: np.ndarray, gt: np.ndarray) -> float:
    return make_reward(REWARDS[suite]).custom(pred, gt)


def test_centreline_reward_by_hand() -> None:
    """A line 3 px off is right, 4 px off wrong; a second one is half of the length and one component more."""
    assert score("centreline", np.roll(LINE, 3, axis=0), LINE) == 10 + 5
    assert score("centreline", np.roll(LINE, 4, axis=0), LINE) == 5
    assert score("centreline", LINE | np.roll(LINE, 10, axis=0), LINE) == pytest.approx(5 + 5 * 2 / 3)
    assert score("centreline", np.zeros_like(LINE), LINE) == 5 / 2


def test_the_counted_terms_of_centrelines_ask_for_typical_width() -> None:
    """Recall costs 20 a unit; the guard sets in where a mask has more than 3.8 px for every px of line."""
    reward = make_reward(REWARDS["centreline"])
    three = LINE | np.roll(LINE, -1, axis=0) | np.roll(LINE, 1, axis=0)
    terms = [reward(mask, LINE)[1] for mask in (three, three | np.roll(three, 3, axis=0))]
    assert terms[0]["precision_term"] == 0
    assert terms[1]["precision_term"] == pytest.approx(10 * 10 * 36 / 37 * (1 / 6 - 0.263))
    assert reward(LINE & (np.arange(30) < 15), LINE)[1]["recall_term"] == -10


def test_number_reward_by_hand() -> None:
    """20 px beside an area of 25: off by a fifth. A mask has no number: the built-in Dice alone counts."""
    area = area_mask(np.arange(900).reshape(30, 30) < 25)
    assert score("number", LINE, area) == pytest.approx(-2)
    assert score("number", np.ones_like(LINE), area) == -10
    assert score("number", LINE, ~LINE) == 0


def test_report_reward_by_hand() -> None:
    """Length within 10 %: 5. Every component too many or too few: -0.5."""
    assert score("own_reward", LINE & (np.arange(30) < 23), LINE) == 5  # 18 of 20
    assert score("own_reward", LINE & (np.arange(30) < 22), LINE) == 0
    assert score("own_reward", LINE & (np.arange(30) != 14), LINE) == 4.5


@pytest.mark.parametrize("suite", METHODS)
def test_training_images_have_partial_labels_and_test_images_masks(
    suite, split: Split, tmp_path: Path
) -> None:
    partly = {"centreline": (*split.train, *split.val), "number": split.train, "own_reward": ()}[suite]
    write_root(tmp_path / "data", split, labels_of(suite, split))
    stored = {sample.image_path.stem: load_mask(sample) for sample in find_samples(tmp_path / "data")}
    full = {s.image_path.stem: load_mask(s) for part in (split.train, split.val, split.test) for s in part}
    changed = {stem for stem, mask in full.items() if not np.array_equal(stored[stem], mask)}
    assert changed <= {sample.image_path.stem for sample in partly}
    assert len(changed) == len(partly) - NUM_LABELLED * (suite == "number")
    for stem in changed:
        area, kept = full[stem].sum(), stored[stem]
        assert kept.sum() < area / 2 if suite == "centreline" else np.flatnonzero(kept) == area


def test_pseudo_labels_have_the_areas_and_masks_stay(split: Split) -> None:
    def predict(image: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(probabilities=1 - image[..., 0] / 255)

    found = partial_labels.pseudo_labels(split, predict, labels_of("number", split))
    only = {sample.key for sample in partial_labels.number_only(split)}
    for sample in split.train:
        truth, label = load_mask(sample), found[sample.key]
        assert label.sum() == truth.sum()
        assert np.array_equal(label, truth) or sample.key in only
        assert (label & truth).sum() > 0.9 * truth.sum()  # dark pixels, not any


@pytest.mark.parametrize("suite", METHODS)
def test_both_sides_look_at_images_equally_often(suite: str) -> None:
    passes = {}
    for name, method in METHODS[suite].items():
        config = TrainConfig.from_dict(COMMON | REWARDS[suite] | method.options)
        images = config.data.max_train_samples or 40
        own = config.optim.num_epochs * config.ppo.num_passes * images
        passes[name] = own + passes.get(method.start, 0)
    starts = {method.start for method in METHODS[suite].values()}
    assert {number for name, number in passes.items() if name not in starts} == {240}
