"""What the scores are called, what they mean in one sentence, and how many decimals they deserve."""

import math
from collections.abc import Mapping
from typing import Any

from vesselrl.evaluation.results import LOWER_IS_BETTER, NO_DIRECTION

# column -> (name, meaning)
WORDS = {
    "reward": ("Reward", "what training raised: overlap, recall, precision, vessel tree and length in one"),
    "custom_score": ("Own reward", "what your own function returned, before its weight"),
    "dice": ("Dice", "overlap of prediction and truth, 0 to 1; 1 is the same mask"),
    "iou": ("IoU", "overlap divided by union, 0 to 1; stricter than Dice, ranks alike"),
    "recall": ("Recall", "share of the true vessel pixels that were found (sensitivity)"),
    "precision": ("Precision", "share of the predicted pixels that are vessel"),
    "specificity": ("Specificity", "share of the background left alone; always near 1, as vessels are small"),
    "cldice": ("clDice", "overlap of the centrelines, 0 to 1; counts a thin branch as much as a thick one"),
    "tprec": ("Centreline precision", "share of the predicted centreline that lies in a true vessel"),
    "tsens": ("Centreline recall", "share of the true centreline that was found"),
    "beta0_error": ("Pieces wrong (β0 error)", "how many separate pieces too many or too few"),
    "beta1_error": ("Loops wrong (β1 error)", "how many closed loops too many or too few"),
    "length_ratio": ("Length ratio", "predicted centreline length over the true one; 1 is right"),
    "foreground": ("Foreground share", "share of the image predicted as vessel; describes, does not judge"),
    "hd95": ("HD95 (px)", "95th percentile of the distances between the two outlines, in pixels"),
    "nsd": ("NSD", "share of the two outlines that agree within a tolerance, 0 to 1"),
    "recall_thin": ("Recall, thin", "recall on the thinnest true vessels"),
    "recall_medium": ("Recall, medium", "recall on true vessels of medium calibre"),
    "recall_thick": ("Recall, thick", "recall on the thickest true vessels"),
}
SIDES = {"val": "validation", "train": "training"}  # as readers call them, where that is not the same
_ONE_DECIMAL = frozenset({"beta0_error", "beta1_error", "hd95"})


def metric_name(metric: str) -> str:
    """The name a reader sees; an unknown column keeps its own, without underscores."""
    return WORDS[metric][0] if metric in WORDS else metric.replace("_", " ").capitalize()


def good_direction(metric: str) -> str:
    """`higher`, `lower` or `-`: which way is better."""
    if metric in NO_DIRECTION:
        return "-"
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def number(metric: str, value: float | None, sign: bool = False) -> str:
    """A score as text, with as many decimals as its kind deserves; nan and None are `undefined`.

    A difference (`sign`) that would round to nothing gets up to three decimals more, so that no zero hides
    on which side of 0 it lies.

    >>> number("dice", 0.81234), number("beta0_error", 3.25), number("dice", 0.012, sign=True)
    ('0.812', '3.2', '+0.012')
    >>> number("beta1_error", -0.012, sign=True), number("dice", 0.0, sign=True)
    ('-0.01', '0.000')
    """
    if value is None or math.isnan(value):
        return "undefined"
    decimals = 1 if metric in _ONE_DECIMAL else 3
    if not sign:
        return f"{value:.{decimals}f}"
    wanted = decimals
    while round(value, decimals) == 0 and decimals < wanted + 3:
        decimals += 1
    return f"{value:+.{decimals}f}" if round(value, decimals) != 0 else f"{0:.{wanted}f}"


def with_interval(metric: str, mean: float, low: float, high: float, sign: bool = False) -> str:
    """A mean with its interval in brackets, without one if there is none.

    >>> with_interval("dice", 0.8, 0.7, 0.9)
    '0.800 (0.700 to 0.900)'
    """
    text = number(metric, mean, sign)
    if any(value is None or math.isnan(value) for value in (mean, low, high)):
        return text
    return f"{text} ({number(metric, low, sign)} to {number(metric, high, sign)})"


def count(amount: int, noun: str) -> str:
    """A number with its noun in singular or plural.

    >>> count(1, "image"), count(2, "image")
    ('1 image', '2 images')
    """
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def masks_in_words(facts: Mapping[str, Any]) -> str:
    """How masks are made, from the fields of a `PostProcessing`; what is not done is left out.

    >>> masks_in_words({"threshold": 0.5, "min_component_px": 20, "close_gaps": 0.002})
    'threshold 0.5, components from 20 px, gaps closed above 0.002'
    """
    if facts.get("threshold") is None:
        return "threshold unknown"
    words = [f"threshold {facts['threshold']:g}"]
    # Evaluations written before there were such rules have none.
    smallest, level = facts.get("min_component_px"), facts.get("close_gaps")
    words += [f"components from {smallest} px"] if smallest else []
    words += [f"gaps closed above {level:g}"] if level else []
    return ", ".join(words)


def images_text(num_images: int, num_patients: int, side: str = "all") -> str:
    """How many images of how many patients, on which side of the split.

    >>> images_text(7, 1, "val"), images_text(1, 1), images_text(4, 2, "test")
    ('7 validation images of 1 patient', '1 image of 1 patient', '4 test images of 2 patients')
    """
    noun = "image" if side == "all" else f"{SIDES.get(side, side)} image"
    return f"{count(num_images, noun)} of {count(num_patients, 'patient')}"
