"""What a run's figures mean, in words: not learning, drifting, or earning reward for the wrong thing.

Every rule looks at a window of steps, or at whole validations, and says one sentence with the number it saw
and which option to change. docs/diagnostics.md lists them all. The limits were set on finished trainings of
the miniature: far outside what those that gained have shown.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vesselrl.training.history import History

# Steps that a rule looks at, and validations in a row without gain.
WINDOW = 20
FLAT_VALIDATIONS = 4
# A change of validation reward counts from this share of the starting reward (of 1, if that is smaller).
REWARD_MARGIN = 0.02
# Scores on validation that must not pay for a rising reward: the fall that is reported, and what helps.
DICE_MARGIN = 0.01
TRADED = {
    "precision": (0.05, "Raise --precision_target or --precision_weight."),
    "recall": (0.05, "Raise --recall_target or --recall_weight, or lower --precision_weight."),
    "cldice": (0.05, "Raise --topology_weight."),
}


@dataclass(frozen=True)
class Finding:
    """One thing that the log noticed.

    Attributes:
        step: training step.
        code: name of the rule, as in docs/diagnostics.md.
        sign: what was seen, with the number.
        advice: which option to change, and in which direction.
    """

    step: int
    code: str
    sign: str
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.code}: {self.sign} {self.advice}"


# A rule's answer: the sign and the advice, or nothing to say.
Answer = tuple[str, str] | None


class Diagnosis:
    """Reads the figures of every step and the scores of every validation.

    A finding is reported once; again only after a window of steps (or one validation) without it.

    Args:
        max_grad_norm: where gradients are clipped, the setting of the run.
    """

    def __init__(self, max_grad_norm: float = 1.0) -> None:
        self.max_grad_norm = max_grad_norm
        self.history = History(WINDOW)
        self.validations: list[dict[str, float]] = []
        self._last_seen: dict[str, int] = {}

    def after_step(self, step: int, figures: Mapping[str, float]) -> list[Finding]:
        """Takes the `train/` figures of a step and returns what is new."""
        self.history.add(comparable(figures))
        answers = {code: rule(self.history) for code, rule in STEP_RULES.items()}
        answers["gradient_explodes"] = gradient_explodes(self.history, self.max_grad_norm)
        return list(self._new(step, answers, WINDOW))

    def after_validation(self, step: int, scores: Mapping[str, float]) -> list[Finding]:
        """Takes the headline scores of a validation, the first of them before any update."""
        self.validations.append(dict(scores))
        answers = {code: rule(self.validations) for code, rule in VALIDATION_RULES.items()}
        return list(self._new(step, answers, 0))

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, ready for JSON."""
        return {
            "history": self.history.state_dict(),
            "validations": self.validations,
            "last_seen": self._last_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.history.load_state_dict(state["history"])
        self.validations = list(state["validations"])
        self._last_seen = dict(state["last_seen"])

    def _new(self, step: int, answers: dict[str, Answer], quiet_steps: int) -> Iterable[Finding]:
        for code, answer in answers.items():
            if answer is None:
                if step - self._last_seen.get(code, step) > quiet_steps:
                    del self._last_seen[code]
                continue
            if code not in self._last_seen:
                yield Finding(step, code, *answer)
            self._last_seen[code] = step


def comparable(figures: Mapping[str, float]) -> dict[str, float]:
    """The `train/` figures that mean the same at every step: no reward while prices move, see goals.py."""
    prices_move = any(name.startswith("train/price/") for name in figures)
    return {
        name: value
        for name, value in figures.items()
        if name.startswith("train/") and not (prices_move and "reward" in name)
    }


# ---- Rules for the steps


def masks_earn_the_same(history: History) -> Answer:
    """Images whose drawn masks all earned the same teach nothing."""
    share = _mean(history, "train/zero_variance_groups")
    if share is None or share <= 0.5:
        return None
    return (
        f"In {share:.0%} of the images all drawn masks earned the same, so there was nothing to compare.",
        "Raise --temperature or --num_samples; if it is 100 %, check that the reward is not a constant.",
    )


def masks_look_alike(history: History) -> Answer:
    """The policy has become so sure that its samples hardly differ."""
    entropy = _median(history, "train/entropy")
    first, now = history.first("train/reward_std"), history.recent("train/reward_std")
    if entropy is not None and entropy < 0.2:
        sign = f"The entropy is down to {entropy:.2g} nats per undecided pixel."
    elif now is not None and first.mean() > 0 and np.median(now) < 0.05 * np.median(first):
        sign = (
            f"The rewards of an image's masks differ by {np.median(now):.2g} only, "
            f"{np.median(first):.2g} at the start."
        )
    else:
        return None
    return f"{sign} The drawn masks are becoming alike.", "Raise --entropy_coef or --temperature."


def policy_jumps(history: History) -> Answer:
    """One step moves the policy too far from the masks it is judged by."""
    moved = _median(history, "train/approx_kl")
    if moved is None or moved <= 5:
        return None
    return (
        f"Each step moves the policy by {moved:.2g} (train/approx_kl; below 1 is usual).",
        "Lower --learning_rate or --num_passes.",
    )


def clipped_everywhere(history: History) -> Answer:
    """Most of the credited pixels have left the trust interval."""
    share = _median(history, "train/clipfrac")
    if share is None or share <= 0.5:
        return None
    return (
        f"{share:.0%} of the credited pixels have left the clip range within a step and learn nothing more.",
        "Lower --learning_rate or --num_passes.",
    )


def drifts_without_gain(history: History) -> Answer:
    """Far from the starting policy, and no better for it."""
    distance = _median(history, "train/kl_ref")
    first, now = history.first("train/reward"), history.recent("train/reward")
    if distance is None or distance <= 20 or now is None or now.mean() > first.mean():
        return None
    return (
        f"The policy is far from where it began (train/kl_ref {distance:.3g}) and earns no more: "
        f"{now.mean():.3g}, {first.mean():.3g} at the start.",
        "Lower --learning_rate or raise --kl_coef.",
    )


def stands_still(history: History) -> Answer:
    """The policy is where it began, although it is being trained."""
    distance, moved = (history.recent(f"train/{name}") for name in ("kl_ref", "approx_kl"))
    if distance is None or moved is None or max(distance.max(), moved.max()) >= 1e-8:
        return None
    return (
        f"The policy has not moved from where it began (train/kl_ref at most {distance.max():.2g}).",
        "Raise --learning_rate, or add mask_decoder and image_encoder to --lora_scope.",
    )


def gradient_vanishes(history: History) -> Answer:
    """Hardly any gradient arrives at the adapters."""
    norm = _median(history, "train/grad_norm")
    if norm is None or not 0 < norm < 1e-4:
        return None
    return (
        f"The gradient has a norm of only {norm:.2g}.",
        "Add mask_decoder and image_encoder to --lora_scope; check that the reward differs between masks.",
    )


def gradient_explodes(history: History, max_grad_norm: float) -> Answer:
    """Every gradient is cut to a small part of itself."""
    norm = _median(history, "train/grad_norm")
    if norm is None or norm <= 100 * max_grad_norm:
        return None
    return (
        f"The gradient has a norm of {norm:.3g}, {norm / max_grad_norm:.0f} times --max_grad_norm: nearly "
        "all of it is cut away, and a few pixels decide.",
        "Lower --learning_rate.",
    )


def foreground_runs_away(history: History) -> Answer:
    """The predicted vessel area leaves the true one, either way."""
    start, share = history.start("train/foreground"), _median(history, "train/foreground")
    if share is None or start is None:
        return None
    seen = f"The masks hold {share:.2f} times the true vessel area, {start:.2f} times at the start"
    if share > 1.5 * max(start, 1):
        return f"{seen}: they bloat.", "Lower --learning_rate; if they still do, raise --precision_weight."
    if share < 0.5 * min(start, 1):
        return f"{seen}: they shrink.", "Lower --learning_rate; if they still do, raise --recall_weight."
    return None


def one_term_pays(history: History) -> Answer:
    """A term of the reward rises while Dice falls, both beyond three standard errors."""
    fallen = _change(history, "train/reward/dice")
    if fallen is None or fallen[2] >= -3 or fallen[1] > 0.97 * fallen[0]:
        return None
    for key in history.names("train/reward/"):
        risen = _change(history, key)
        if risen is not None and risen[2] > 3:
            name = key.removeprefix("train/reward/")
            return (
                f"The reward's {name} term has risen from {risen[0]:.3g} to {risen[1]:.3g} while its Dice "
                f"term has fallen from {fallen[0]:.3g} to {fallen[1]:.3g}: overlap pays for it.",
                f"Lower the weight of the {name} term or raise --dice_weight.",
            )
    return None


STEP_RULES: dict[str, Callable[[History], Answer]] = {
    rule.__name__: rule
    for rule in (
        masks_earn_the_same,
        masks_look_alike,
        policy_jumps,
        clipped_everywhere,
        drifts_without_gain,
        stands_still,
        gradient_vanishes,
        foreground_runs_away,
        one_term_pays,
    )
}


# ---- Rules for the validations; the first of them is the start


def below_start(validations: list[dict[str, float]]) -> Answer:
    """The latest validation is worse than the untouched model."""
    start, now = validations[0]["reward"], validations[-1]["reward"]
    if now >= start - _margin(start):
        return None
    return (
        f"The validation reward is {now:.3f}, below the {start:.3f} that the run began with.",
        "If it stays there, lower --learning_rate or raise --kl_coef.",
    )


def flat(validations: list[dict[str, float]]) -> Answer:
    """No validation of the latest few beats those before them."""
    rewards = [scores["reward"] for scores in validations]
    if len(rewards) <= FLAT_VALIDATIONS:
        return None
    best = max(rewards[:-FLAT_VALIDATIONS])
    if max(rewards[-FLAT_VALIDATIONS:]) > best + _margin(best) / 4:
        return None
    return (
        f"The best validation reward, {best:.3f}, is {FLAT_VALIDATIONS} or more validations old.",
        "Stop here, or lower --learning_rate; if it never rose, raise it, or use more images.",
    )


def gaming(validations: list[dict[str, float]]) -> Answer:
    """The reward rises and Dice falls."""
    start, now = validations[0], validations[-1]
    if not _reward_rose(start, now) or now["dice"] >= start["dice"] - DICE_MARGIN:
        return None
    return (
        f"On validation the reward has risen from {start['reward']:.3f} to {now['reward']:.3f} while Dice "
        f"has fallen from {start['dice']:.3f} to {now['dice']:.3f}: the reward pays for the wrong thing.",
        "Raise --dice_weight, or lower the weight of the term that rises (train/reward/...).",
    )


def trading(validations: list[dict[str, float]]) -> Answer:
    """The reward rises and recall, precision or clDice pays for it."""
    start, now = validations[0], validations[-1]
    if not _reward_rose(start, now):
        return None
    for name, (margin, advice) in TRADED.items():
        if now[name] < start[name] - margin:
            return (
                f"On validation the reward has risen from {start['reward']:.3f} to {now['reward']:.3f} while "
                f"{name} has fallen from {start[name]:.3f} to {now[name]:.3f}.",
                f"If that is not the trade you want: {advice}",
            )
    return None


VALIDATION_RULES: dict[str, Callable[[list[dict[str, float]]], Answer]] = {
    rule.__name__: rule for rule in (below_start, flat, gaming, trading)
}


def _reward_rose(start: Mapping[str, float], now: Mapping[str, float]) -> bool:
    return now["reward"] > start["reward"] + _margin(start["reward"])


def _margin(reward: float) -> float:
    return REWARD_MARGIN * max(1.0, abs(reward))


def _mean(history: History, key: str) -> float | None:
    values = history.recent(key)
    return None if values is None else float(values.mean())


def _median(history: History, key: str) -> float | None:
    values = history.recent(key)
    return None if values is None else float(np.median(values))


def _change(history: History, key: str) -> tuple[float, float, float] | None:
    """Mean of the first and of the latest values, and their difference in standard errors."""
    first, now = history.first(key), history.recent(key)
    if now is None:
        return None
    error = ((first.var(ddof=1) + now.var(ddof=1)) / history.length) ** 0.5
    difference = float(now.mean() - first.mean())
    return float(first.mean()), float(now.mean()), difference / error if error > 0 else 0.0
