"""What the learning benchmark compares: the arms, the suites, and every size in one table.

An arm is a way to get masks: a training, or another post-processing of what a training predicts. C0 to C7 are
the controls that reinforcement learning must beat.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vesselrl.scoring.postprocessing import PostProcessing

SPLIT_SEED = 42
FIRST_SEED = 42  # of the trainings: 42, 43, ...
# Of every training and of all masks but the untouched base's: specks are easily removed and gaps easily
# closed, so nobody shall win by having fewer of them.
FIXED_POST = PostProcessing(min_component_px=20, close_gaps=0.05)


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    Attributes:
        name: of its folder.
        label: in the report.
        settings: fields of `TrainConfig` that its training changes; None: nothing is trained.
        sources: whose predictions it takes, its own if empty; of several, the one whose tuned masks have the
            highest validation reward.
        post: how masks are made: "raw" at threshold 0.5; "fixed" by `FIXED_POST`; "threshold" as that, with
            the threshold tuned on validation; "tuned" with threshold, smallest component and closing of gaps
            tuned.
    """

    name: str
    label: str
    settings: dict[str, Any] | None = field(default=None, hash=False)
    sources: tuple[str, ...] = ()
    post: Literal["raw", "fixed", "threshold", "tuned"] = "fixed"

    @property
    def predicts(self) -> bool:
        """Whether it has predictions of its own."""
        return not self.sources


ARMS = (
    Arm("base", "C0 untouched base", post="raw"),
    Arm("base_tuned", "C1 base, tuned threshold", sources=("base",), post="threshold"),
    Arm("sft", "C2 supervised", {"stage": "sft"}),
    Arm("sft_tuned", "C3 supervised, tuned threshold", sources=("sft",), post="threshold"),
    Arm("sft_cldice", "C4 supervised with soft clDice", {"stage": "sft", "sft_loss": "bce_dice_cldice"}),
    Arm("unet", "C5 U-Net from scratch", {"control": "unet"}),
    Arm("frangi", "C6 Frangi filter", {"control": "frangi"}),
    Arm("sft_post", "C7 best of C2 to C4, post-processed",
        sources=("sft", "sft_cldice"), post="tuned"),
    Arm("rl", "PPO", {"stage": "rl"}),
    Arm("rl_post", "PPO, post-processed", sources=("rl",), post="tuned"),
    Arm("sft_rl", "supervised then PPO", {"stage": "sft+rl"}),
    Arm("sft_rl_post", "supervised then PPO, post-processed",
        sources=("sft_rl",), post="tuned"),
)  # fmt: skip
BY_NAME = {arm.name: arm for arm in ARMS}

RL_ARMS = ("rl", "rl_post", "sft_rl", "sft_rl_post")
# The strongest of these on validation is the control that must be beaten.
STRONG_CONTROLS = ("sft", "sft_tuned", "sft_cldice", "sft_post")
# Those that are compared at the recall of the RL arm, with their predictions.
EQUAL_RECALL = {"base_tuned": "base", "sft_tuned": "sft"}


@dataclass(frozen=True)
class Suite:
    """Images, sizes and schedule, the same for every arm.

    Attributes:
        name: on the command line, and of the folder.
        title: in the report.
        data_root: default folder; None: the built-in synthetic target domain.
        num_val_patients: patients of the published training half that validate; None: no published halves,
            the split is the ordinary one by patient.
        dropped: file names without ending that no side gets.
        num_train: most training images; None: all. Likewise `num_val` and `num_test`.
        settings: fields of `TrainConfig` for every training.
    """

    name: str
    title: str
    data_root: str | None = None
    num_val_patients: int | None = None
    dropped: tuple[str, ...] = ()
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    settings: dict[str, Any] = field(default_factory=dict, hash=False)


# ---- Every size ----

ALL = {
    "batch_size": 1,
    "num_passes": 2,
    "min_component_px": FIXED_POST.min_component_px,
    "close_gaps": FIXED_POST.close_gaps,
}
SUITES = {
    "synthetic": Suite(
        "synthetic", "the built-in synthetic target domain",
        num_train=250, num_val=100,
        settings=ALL | {"num_epochs": 4, "val_freq": 250},
    ),
    # train_017 and train_030 are frames of runs that the test half shows as well.
    "coronary80": Suite(
        "coronary80", "coronary80, its published halves",
        data_root="../shared/data/coronary80", num_val_patients=8, dropped=("train_017", "train_030"),
        settings=ALL | {"num_epochs": 12, "val_freq": 60},
    ),
    "chase_db1": Suite(
        "chase_db1", "CHASE_DB1, its published halves",
        data_root="../shared/data/chase_db1", num_val_patients=2,
        settings=ALL | {"num_epochs": 9, "val_freq": 96},
    ),
}  # fmt: skip
# What --reduced changes: to see the whole way in minutes, not to claim anything.
REDUCED = {
    "synthetic": {"num_train": 150, "num_val": 40, "num_test": 52, "epochs": 2},
    "coronary80": {"epochs": 3},
    "chase_db1": {"epochs": 3},
}


def get_suite(name: str, reduced: bool = False) -> Suite:
    """A suite by name, in full or reduced; a reduced one has a folder of its own.

    Raises:
        ValueError: unknown name.
    """
    if name not in SUITES:
        raise ValueError(f"--suite is {name!r}; choose one of {', '.join(SUITES)}.")
    suite = SUITES[name]
    if not reduced:
        return suite
    sizes = dict(REDUCED[name])
    settings = suite.settings | {"num_epochs": sizes.pop("epochs")}
    return replace(suite, name=f"{name}_reduced", title=f"{suite.title}, reduced", settings=settings, **sizes)


def get_seeds(number: int) -> tuple[int, ...]:
    """The training seeds of so many trainings per arm.

    Raises:
        ValueError: fewer than one.

    >>> get_seeds(3)
    (42, 43, 44)
    """
    if number < 1:
        raise ValueError(f"--seeds is {number}; give the number of seeds, at least 1.")
    return tuple(range(FIRST_SEED, FIRST_SEED + number))
