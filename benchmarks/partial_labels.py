"""Where labels end: PPO by a reward against supervised training, on images without full masks.

Three suites. centreline: masks of training and validation images are lines of one px. number: ten training
images have masks, the others only the area of their vessels. own_reward: all have masks, but what counts is a
reward without a gradient. Test images have full masks, and choose nothing.
"""

import json as json_module
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from benchmarks import run, trainings
from benchmarks.scores import Scorer, load_predictor
from benchmarks.trainings import FIXED_POST
from vesselrl.data.samples import find_samples, load_image, load_mask
from vesselrl.data.splits import SUBSETS, Split, read_split, split_by_patient, take, write_split
from vesselrl.evaluation.evaluate import score_rows
from vesselrl.evaluation.statistics import Interval, bootstrap_interval, paired_difference
from vesselrl.evaluation.tuning import best_postprocessing, score_postprocessing
from vesselrl.evaluation.words import metric_name, with_interval
from vesselrl.experiment.run_folder import atomic_write, check_writable, write_text
from vesselrl.scoring.postprocessing import THRESHOLD_ONLY, PostProcessing
from vesselrl.scoring.rewards import Reward, make_reward
from vesselrl.scoring.scores import cached_truth
from vesselrl.scoring.topology import topology
from vesselrl.synthetic.dataset import SEED as DATA_SEED
from vesselrl.synthetic.dataset import TARGET, write_dataset

WIDTH_PX = 3.8  # typical vessel width of these images, known to both sides
NEAR = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))  # a predicted centreline within 3 px is right
NUM_LABELLED = 10  # training images of the suite `number` that have masks
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
GRID = {"thresholds": THRESHOLDS, "sizes_px": (0, 20, 80), "gap_levels": (0.0, 0.005, 0.05)}
METRICS = "dice recall precision cldice beta0_error reward".split()


# ---- Rewards, for --reward_fn; each is added to built-in terms


def centreline_reward(pred: np.ndarray, gt: np.ndarray) -> float:
    """10 x share of the predicted centreline within 3 px of the true one + 5 x agreement of components."""
    shape, truth = topology(pred), cached_truth(gt)
    near = cv2.dilate(truth.topology.skeleton.astype(np.uint8), NEAR) > 0
    right = np.count_nonzero(shape.skeleton & near) / max(shape.length_px, 1)
    numbers = shape.num_components, truth.topology.num_components
    return 10 * right + 5 * (1 + min(numbers)) / (1 + max(numbers))


def number_reward(pred: np.ndarray, gt: np.ndarray) -> float:
    """-10 x relative error of the area, at most 1, where `gt` carries an area; 0 where it is a mask."""
    if np.count_nonzero(gt) != 1:
        return 0.0
    return -10 * min(abs(np.count_nonzero(pred) / np.flatnonzero(gt)[0] - 1), 1.0)


def report_reward(pred: np.ndarray, gt: np.ndarray) -> float:
    """5 where the length of the vessels is right within 10 %, minus 0.5 per wrong component, at most 5."""
    shape, truth = topology(pred), cached_truth(gt).topology
    is_right = abs(shape.length_px - truth.length_px) <= 0.1 * truth.length_px
    return 5.0 * is_right - 0.5 * min(abs(shape.num_components - truth.num_components), 10)


# ---- Labels


def centreline(mask: np.ndarray) -> np.ndarray:
    """The centreline of a mask, one px wide."""
    return topology(mask).skeleton


def area_mask(mask: np.ndarray) -> np.ndarray:
    """A mask of one pixel, which carries the area of another: its place in reading order, from 0."""
    carrier = np.zeros(mask.shape, bool)
    carrier.flat[np.count_nonzero(mask)] = True
    return carrier


def labels_of(suite: str, split: Split) -> dict[str, np.ndarray]:
    """The mask that each image of a suite has in training, by key."""
    masks = {sample.key: load_mask(sample) for subset in SUBSETS for sample in getattr(split, subset)}
    convert, partly = {
        "centreline": (centreline, (*split.train, *split.val)),
        "number": (area_mask, number_only(split)),
        "own_reward": (np.copy, ()),
    }[suite]
    return masks | {sample.key: convert(masks[sample.key]) for sample in partly}


def number_only(split: Split) -> list[Any]:
    """The training images of the suite `number` without masks; those with are the first that `take` gives."""
    labelled = {sample.key for sample in take(split.train, NUM_LABELLED, trainings.SEED)}
    return [sample for sample in split.train if sample.key not in labelled]


def write_root(root: Path, split: Split, masks: Mapping[str, np.ndarray]) -> None:
    """Writes a data root of the same images with other masks, complete or not at all."""
    if root.exists():
        return
    with atomic_write(root) as partial:
        for folder in ("images", "masks"):
            (partial / folder).mkdir(parents=True)
        for sample in (sample for subset in SUBSETS for sample in getattr(split, subset)):
            shutil.copy(sample.image_path, partial / "images")
            path = partial / "masks" / f"{sample.image_path.stem}.png"
            Image.fromarray(masks[sample.key].astype(np.uint8) * 255).save(path)


def pseudo_labels(split: Split, predict: Callable, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks in place of areas: of each such image as many of its most probable pixels as its area says."""
    found = dict(masks)
    for sample in number_only(split):
        probabilities, (area,) = predict(load_image(sample)).probabilities, np.flatnonzero(masks[sample.key])
        found[sample.key] = np.zeros(probabilities.shape, bool)
        found[sample.key].flat[np.argsort(-probabilities, axis=None, kind="stable")[:area]] = True
    return found


def tubes(split: Split, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks in place of the training images' centrelines: 3 px wide, and so about as wide as vessels are."""
    lines = {sample.key: masks[sample.key].astype(np.uint8) for sample in split.train}
    return masks | {key: cv2.dilate(line, np.ones((3, 3))) > 0 for key, line in lines.items()}


def numbers(split: Split, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Areas of all training images: beside masks the health rules would take an area for a bloated mask."""
    labelled = take(split.train, NUM_LABELLED, trainings.SEED)
    return masks | {sample.key: area_mask(masks[sample.key]) for sample in labelled}


# ---- Trainings


class Method(NamedTuple):
    """A training on the labels of its suite, or on masks that were made of them."""

    label: str
    options: dict[str, Any]
    start: str = ""  # the method that it goes on from; none: the base model
    made: str = ""  # "tubes" around centrelines, "pseudo" labels by the method of `start`, "numbers" for all
    is_rl: bool = False


COMMON = {"batch_size": 1, "min_component_px": 20, "close_gaps": 0.05, "val_freq": 80, "num_workers": 1}
# Beside a line of one px recall is how much of it is found, and precision 1 over the width of a perfect mask.
# Both are counts of pixels, with exact credit.
COUNTED = {"recall_target": 1, "precision_target": round(1 / WIDTH_PX, 3), "precision_weight": 10}
COUNTED |= dict.fromkeys(("dice_weight", "topology_weight", "length_weight"), 0)
REWARDS = {
    "centreline": COUNTED | {"reward_fn": "benchmarks.partial_labels:centreline_reward"},
    "number": {"reward_type": "simple_dice", "reward_fn": "benchmarks.partial_labels:number_reward"},
    "own_reward": {"reward_type": "simple_dice", "reward_fn": "benchmarks.partial_labels:report_reward"},
}
SFT, SFT_RL = {"stage": "sft", "num_epochs": 3}, {"stage": "sft+rl", "num_epochs": 3, "rl_epochs": 1}
TEN = {"stage": "sft", "max_train_samples": NUM_LABELLED, "num_passes": 4}
ON = {"stage": "rl", "num_epochs": 2, "learning_rate": 5e-5}  # as after the supervised stage of sft+rl
METHODS = {
    "centreline": {
        "sft_tubes": Method("supervised on tubes of typical width", SFT, made="tubes"),
        "start": Method("the same, two thirds of the passes", SFT | {"num_epochs": 2}, made="tubes"),
        "tubes_rl": Method("supervised on tubes, then PPO", ON | {"num_epochs": 1}, "start", is_rl=True),
    },
    "number": {
        "ten": Method("supervised on ten, a third of the passes", TEN | {"num_epochs": 2}),
        "pseudo": Method(
            "supervised on ten, then on pseudo-labels", SFT | {"num_epochs": 2}, "ten", "pseudo"
        ),
        "rl": Method("supervised on ten, then PPO on numbers", ON, "ten", "numbers", is_rl=True),
    },
    "own_reward": {
        "sft": Method("supervised", SFT),
        "sft_rl": Method("supervised, then PPO", SFT_RL, is_rl=True),
    },
}


def train_methods(suite: str, split: Split, folder: Path, seed: int) -> None:
    """Trains what is not finished of one seed, one after the other; RuntimeError where one fails."""
    masks = labels_of(suite, split)
    for name, method in METHODS[suite].items():
        place, root = folder / f"{name}_seed{seed}", folder / "data"
        start = trainings.last_run(folder / f"{method.start}_seed{seed}") if method.start else None
        if method.made == "pseudo":
            if not (root := folder / f"pseudo_labels_seed{seed}").exists():
                write_root(root, split, pseudo_labels(split, load_predictor(start), masks))
        elif method.made:
            made = {"tubes": tubes, "numbers": numbers}[method.made](split, masks)
            write_root(root := folder / method.made, split, made)
        places = {"data_root": str(root), "output_dir": str(place)}
        places |= {"init_lora": str(start)} if start else {"split_file": str(folder / "data_split.json")}
        own = {"split_seed": trainings.SEED, "seed": seed} | method.options
        options = COMMON | REWARDS[suite] | places | own
        settings = trainings.plain_settings(options)
        trainings.check_settings(place, settings)
        if not trainings.last_run(place) and (reason := trainings.train_one(place, options, settings)):
            raise RuntimeError(f"{place.name}: {reason}")


# ---- Scores


class Result(NamedTuple):
    """A method with one post-processing, and its scores, means over the seeds."""

    label: str
    is_rl: bool
    tuned: bool
    val_reward: float
    scores: dict[str, np.ndarray]  # (test images,) by metric


def score_method(suite: str, name: str, scorers: Sequence[Scorer]) -> list[Result]:
    """Scores a method as it was trained, and with post-processing tuned on validation for the reward."""
    method = METHODS[suite].get(name, Method("base model", {}))
    reward, as_trained = make_reward(REWARDS[suite]), FIXED_POST if method.options else THRESHOLD_ONLY
    grids = [score_postprocessing(one.images(name, "val"), reward, **GRID) for one in scorers]
    results = []
    for words, posts in (("", [as_trained] * len(grids)), (", tuned", [*map(best_postprocessing, grids)])):
        pairs = zip(scorers, posts, strict=True)
        tables = [test_scores(suite, reward, scorer, name, post) for scorer, post in pairs]
        means = {metric: np.mean([table[metric] for table in tables], axis=0) for metric in METRICS}
        val_reward = float(np.mean([grid[post] for grid, post in zip(grids, posts, strict=True)]))
        results.append(Result(method.label + words, method.is_rl, bool(words), val_reward, means))
    return results


def test_scores(
    suite: str, reward: Reward, scorer: Scorer, name: str, post: PostProcessing
) -> dict[str, np.ndarray]:
    """Scores against full masks; the reward against what it sees in training, lines in the first suite."""
    pairs = [(post.mask(image.filled), image.truth) for image in scorer.images(name, "test")]
    rows = score_rows(scorer.samples["test"], pairs)
    convert = centreline if suite == "centreline" else np.copy
    for row, (mask, truth) in zip(rows, pairs, strict=True):
        row["reward"] = reward(mask, convert(truth))[0]
    return {metric: np.array([row[metric] for row in rows]) for metric in METRICS}


def compare(results: Sequence[Result], patients: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Scores by method, then PPO minus every control that is tuned as it is, or not tuned.

    In bold: the two of highest validation reward.
    """
    rows = {
        f"{one.label} (validation reward {one.val_reward:.3f})": {
            metric: bootstrap_interval(values, patients) for metric, values in one.scores.items()
        }
        for one in results
    }
    ppo, controls = ([one for one in results if one.is_rl == is_rl] for is_rl in (True, False))
    best = [max(group, key=lambda one: one.val_reward) for group in (ppo, controls)]
    for rl, control in product(ppo, controls):
        name, is_best = f"{rl.label} minus {control.label}", rl is best[0] and control is best[1]
        if rl.tuned == control.tuned or is_best:
            rows[f"**{name}**" if is_best else name] = {
                metric: paired_difference(values, rl.scores[metric], patients)
                for metric, values in control.scores.items()
            }
    return rows


def table(rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """Means with their 95 % intervals, as a Markdown table."""
    lines = [["", *map(metric_name, METRICS)], ["---"] * (len(METRICS) + 1)]
    for label, row in rows.items():
        texts = (with_interval(m, x.mean, x.low, x.high, sign=" minus " in label) for m, x in row.items())
        lines.append([label, *map(str, texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def partial_labels(
    suite: Literal["centreline", "number", "own_reward"] | None = None,
    seeds: tuple[int, ...] = (42, 43, 44),
    output_dir: str = "output/bench_partial_labels",
    num_images: int = 80,
    json: bool = False,
) -> int:
    """Compares PPO with supervised training where training images have no full masks.

    Args:
        suite: none: all three, one after the other.
        seeds: one training of every method each.
        output_dir: finished trainings are kept here and not trained again.
        num_images: built-in images, one per patient: half for training, an eighth for validation.
        json: print the numbers as JSON.
    """
    place, numbers = Path(output_dir), {}
    check_writable(place)
    source = write_dataset(place / "source", TARGET, num_images, 1, 1, seed=DATA_SEED, layout="masks")
    split = split_by_patient(find_samples(source), trainings.SEED, (0.5, 0.125, 0.375))
    for name in [suite] if suite else METHODS:
        folder = place / name
        write_root(folder / "data", split, labels_of(name, split))
        write_split(folder / "data_split.json", split)
        for seed in seeds:
            train_methods(name, split, folder, seed)
        labelled = read_split(folder / "data_split.json", find_samples(folder / "data"))
        scorers = [Scorer(labelled, folder, seed) for seed in seeds]
        results = score_method(name, "base", scorers[:1])
        results += [result for method in METHODS[name] for result in score_method(name, method, scorers)]
        rows = compare(results, [sample.patient for sample in split.test])
        sizes = " / ".join(str(len(getattr(split, subset))) for subset in SUBSETS)
        numbers[name] = {k: {m: [x.mean, x.low, x.high] for m, x in row.items()} for k, row in rows.items()}
        write_text(folder / "report.md", f"## {name}, {len(seeds)} seeds, {sizes} images\n\n{table(rows)}\n")
        if not json:
            print((folder / "report.md").read_text())
    if json:
        print(json_module.dumps(numbers, indent=1))
    return 0


if __name__ == "__main__":
    run(partial_labels)
