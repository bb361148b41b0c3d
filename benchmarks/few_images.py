"""Few labelled images: Sa2VA with a detail head against two U-Nets, on draws of the training images."""

import random
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

from benchmarks import run
from benchmarks.learning import COMPARED, READING, SHOWN, compare, difference, pooled, scores, table
from benchmarks.scores import Scorer
from benchmarks.trainings import (
    FIXED_POST,
    METHODS,
    SEED,
    SUITES,
    TABLE,
    check_settings,
    plain_settings,
    prepare_split,
    train_waiting,
)
from vesselrl.data.splits import write_split
from vesselrl.evaluation.results import Evaluation
from vesselrl.evaluation.statistics import bootstrap_interval
from vesselrl.evaluation.words import metric_name, with_interval
from vesselrl.experiment.run_folder import check_writable, read_json, write_text

METHOD, CONTROLS = "sft_detail", ("unet_pretrained", "unet")


def few_images(
    suite: Literal["coronary80", "chase_db1"] = "coronary80",
    num_images: int = 10,
    draws: int = 10,
    first_seed: int = SEED,
    passes: int = 720,
    val_freq: int = 120,
    workers: int = 2,
    output_dir: str = "output/bench_few_images",
    data_root: str | None = None,
) -> int:
    """Trains each method on draws of a few training images; a score is the mean over the draws.

    Validation and test images are those of the learning benchmark; what is finished is not trained again.

    Args:
        suite: real images, see docs/benchmarks.md.
        num_images: training images of a draw.
        draws: each with a training seed of its own.
        first_seed: of the first draw; the others have the next numbers.
        passes: images that a training sees, each as often as it is passed over.
        val_freq: images from one validation to the next; an epoch has as many passes as fit.
        workers: trainings at a time, one thread each.
        output_dir: where the trainings are kept.
        data_root: data set of the suite; none: ../shared/data/SUITE.
    """
    folder, root = Path(output_dir) / f"{suite}_{num_images}", Path(data_root or f"../shared/data/{suite}")
    check_writable(folder)
    full = prepare_split(SUITES[suite], root, folder / "data_split.json")
    num_passes = max(1, min(val_freq, passes) // num_images)
    common = TABLE["common"] | {
        "data_root": str(root),
        "split_seed": SEED,
        "num_epochs": passes // (num_images * num_passes),
        "num_passes": num_passes,
        "val_freq": val_freq,
    }
    splits, jobs = {}, {}
    for seed in range(first_seed, first_seed + draws):
        split_file = folder / f"data_split_{seed}.json"
        splits[seed] = replace(full, train=tuple(random.Random(seed).sample(full.train, num_images)))
        write_split(split_file, splits[seed])
        for name in (METHOD, *CONTROLS):
            place = folder / f"{name}_seed{seed}"
            own = {"split_file": str(split_file), "seed": seed, "output_dir": str(place)}
            options = common | METHODS[name].options | own
            settings = plain_settings(options) | {"images": read_json(split_file)["sha256"]}
            check_settings(place, settings)
            jobs[place] = options, settings
    if failures := train_waiting(jobs, workers):
        print(*(f"Failed: {name}: {error}." for name, error in failures.items()), sep="\n", file=sys.stderr)
        return 1
    tests = {name: [] for name in (METHOD, *CONTROLS)}
    for seed, split in splits.items():
        scorer = Scorer(split, folder, seed)
        for name, found in tests.items():
            found.append(scorer.scores(name, "test", "test", name, FIXED_POST))
    made = num_images * num_passes * common["num_epochs"]
    title = f"{num_images} training images of {SUITES[suite].title}: {draws} draws, {made} image passes"
    write_text(folder / "report.md", report(title, tests, splits))
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 0


def report(title: str, tests: dict[str, list[Evaluation]], seeds: Collection[int]) -> str:
    """Scores of all methods, what METHOD has more than each control, and the Dice of each draw."""
    together = {name: pooled(drawn) for name, drawn in tests.items()}
    rows = [(METHODS[name].label, *scores(one, SHOWN)) for name, one in together.items()]
    dice, minus = {name: [one.headline["dice"] for one in drawn] for name, drawn in tests.items()}, []
    for name in CONTROLS:
        gaps = [one - other for one, other in zip(dice[METHOD], dice[name], strict=True)]
        found = bootstrap_interval(gaps, [*map(str, seeds)])
        drawn = with_interval("dice", found.mean, found.low, found.high, sign=True)
        line = map(difference, compare(together[name], together[METHOD]).values())
        minus.append((METHODS[name].label, *line, f"{drawn}, {sum(gap > 0 for gap in gaps)} of {len(gaps)}"))
    columns = ["", *map(metric_name, COMPARED), "β0 error in %", "Dice over draws, higher in"]
    parts = [f"# {title}", READING, table(["", *map(metric_name, SHOWN)], rows)]
    parts += [f"## {METHODS[METHOD].label} minus", table(columns, minus)]
    drawn = ((METHODS[name].label, *(f"{one:.4f}" for one in values)) for name, values in dice.items())
    parts += ["## Dice of each draw, by its seed", table(["", *map(str, seeds)], [*drawn])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run(few_images)
