"""Health of a training: one list of rules over its metrics, and the action when one of them finds a symptom.

A rule measures the severity of a symptom over a window of steps, or over the validations. Above its `report`
threshold the issue goes to the log and to diagnosis.json (docs/diagnostics.md); at its `roll_back` threshold
the run returns to the last good weights with half the learning rate, at most MAX_CORRECTIONS times. The
thresholds lie far outside of what trainings of the miniature that gained have shown.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.experiment.config import TrainConfig
from vesselrl.training import processes
from vesselrl.training.checkpoint import Model

WINDOW = 20  # steps that a rule looks at: a single one says nothing, unless it is not even a number
MAX_CORRECTIONS = 5
HEALTHY = 0.5  # part of every `roll_back` threshold below which weights count as good
FLAT_VALIDATIONS = 4  # validations in a row without gain
KNOWN_DICE = 0.6  # before training; below it a detail head gains far more than PPO alone: R029, R078
HUGE_REWARD = 1e4  # the built-in ones stay below 20; beyond it no learning rate is at fault


class Issue(NamedTuple):
    """A symptom of a run, and the advice which option to change in which direction."""

    step: int
    code: str  # of the rule
    symptom: str
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.code}: {self.symptom} {self.advice}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, by the keys of diagnosis.json."""
        return dict(zip(("step", "code", "sign", "advice"), self, strict=True))


@dataclass
class History:
    """The first and the latest WINDOW values of every metric, and the scores of all validations."""

    first: dict[str, list[float]] = field(default_factory=dict)
    latest: dict[str, list[float]] = field(default_factory=dict)
    since_roll_back: dict[str, int] = field(default_factory=dict)  # number of values
    validations: list[dict[str, float]] = field(default_factory=list)
    fit: dict[str, Any] = field(default_factory=dict)  # as from `measure_fit`, with what `teaching` says
    is_rl: bool = True  # the latest step was one of PPO; so is what comes where none was taken

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds the `train/` metrics of a step, but no reward while multipliers move, and no loss of PPO."""
        self.is_rl = "train/reward" in metrics if metrics else self.is_rl
        multipliers_move = any(name.startswith("train/price/") for name in metrics)
        for key, value in metrics.items():
            name = key.removeprefix("train/")
            of_ppo = name == "loss" and "train/policy_loss" in metrics
            hidden = of_ppo or (multipliers_move and "reward" in name)
            if name != key and not hidden:
                self.first[name] = [*self.first.get(name, ()), value][:WINDOW]
                self.latest[name] = [*self.latest.get(name, ()), value][-WINDOW:]
                self.since_roll_back[name] = self.since_roll_back.get(name, 0) + 1

    def mean(self, name: str) -> float:
        """Mean of the latest values."""
        return float(np.mean(self.latest[name]))

    def median(self, name: str) -> float:
        """Median of the latest values."""
        return float(np.median(self.latest[name]))

    def start(self, name: str) -> float:
        """Median of the finite ones of the first five values (one is that of one image); nan without any."""
        finite = [value for value in self.first[name][:5] if np.isfinite(value)]
        return float(np.median(finite)) if finite else math.nan

    def rise(self, name: str) -> float:
        """Mean of the latest values less that of the first."""
        return self.mean(name) - float(np.mean(self.first[name]))

    def standard_errors(self, name: str) -> float:
        """The rise in units of its standard error."""
        variance = np.var(self.first[name], ddof=1) + np.var(self.latest[name], ddof=1)
        return self.rise(name) / float(variance / WINDOW) ** 0.5 if variance > 0 else 0.0


class Rule(NamedTuple):
    """A symptom with its thresholds and advice; severities are larger where it is worse."""

    code: str
    metrics: str  # that it needs, a whole window of each; none: it looks at the validations
    severity: Callable[[History], float]
    report: float | None
    roll_back: float | None
    # Takes the severity's absolute value, and `now` and `first`: the medians of the first of its metrics, the
    # latest and the first validation, and `fit`.
    sentence: str
    advice: str = ""
    rl_advice: str = ""  # what PPO has more


def _area(h: History, sign: int) -> float:
    """Logarithm of predicted over true vessel area, or its inverse; one that was wrong may come nearer."""
    now, start = (float(np.clip(one, 1e-6, 1e6)) for one in (h.median("foreground"), h.start("foreground")))
    return math.log(now / max(start, 1)) if sign > 0 else math.log(min(start, 1) / now)


def _pays(h: History, term: str) -> float:
    """Whether a term of the reward rises while Dice falls, both beyond three standard errors."""
    falls = h.rise("reward/dice") <= -0.03 * np.mean(h.first["reward/dice"])
    errors = h.standard_errors(f"reward/{term}"), h.standard_errors("reward/dice")
    return float(falls and errors[0] > 3 and errors[1] < -3)


def _reward_fall(h: History) -> float:
    first = h.first["greedy_reward"]
    return -h.rise("greedy_reward") / max(float(np.std(first)), 0.1 * abs(float(np.mean(first))), 1e-3)


def _loss_rise(h: History) -> float:
    now, first = h.mean("loss"), float(np.mean(h.first["loss"]))
    return math.log(now / first) if min(now, first) > 0 else -math.inf


def _reward_rise(h: History, start: int, end: int) -> float:
    """Rise of the validation reward in units of the change that counts, 2 % of the start or of 1."""
    start, end = h.validations[start]["reward"], h.validations[end]["reward"]
    return (end - start) / (0.02 * max(1.0, abs(start)))


def _flat(h: History) -> float:
    rewards = [scores["reward"] for scores in h.validations]
    if len(rewards) <= FLAT_VALIDATIONS:
        return -math.inf
    best = max(rewards[:-FLAT_VALIDATIONS])
    return best + 0.005 * max(1.0, abs(best)) - max(rewards[-FLAT_VALIDATIONS:])


def _unknown(h: History) -> float:
    """How far the Dice before training is below that of images that a model knows."""
    return KNOWN_DICE - h.validations[0]["dice"] if h.fit and len(h.validations) == 1 else -math.inf


def _traded(h: History, name: str) -> float:
    """How far a validation score has fallen, if the reward that PPO raises has risen."""
    is_traded = h.is_rl and _reward_rise(h, 0, -1) > 1
    return h.validations[0][name] - h.validations[-1][name] if is_traded else -math.inf


_JUMPS = "Lower --learning_rate or --num_passes."
_ALIKE = "The sampled masks are becoming alike."
_AREA = "The masks hold {now:.2f} times the true vessel area, {first:.2f} times at the start: they "
_TRADE = "On validation the reward has risen from {first[reward]:.3f} to {now[reward]:.3f} while "
_FALL = "{name} has fallen from {{first[{name}]:.3f}} to {{now[{name}]:.3f}}"
_ADVICE = {
    "precision": "Raise --precision_target or --precision_weight.",
    "recall": "Raise --recall_target or --recall_weight, or lower --precision_weight.",
    "cldice": "Raise --topology_weight.",
}
RULES = (
    Rule("masks_earn_the_same", "zero_variance_groups", lambda h: h.mean("zero_variance_groups"), 0.5, None,
         "In {0:.0%} of the images all sampled masks earned the same: there was nothing to compare.",
         "Raise --temperature or --num_samples; if it is 100 %, check that the reward is not a constant."),
    Rule("correction", "zero_variance_groups dice",  # a policy that is sure and right is left alone
         lambda h: h.mean("zero_variance_groups") if h.mean("dice") <= h.start("dice") else -math.inf,
         None, 1, "The policy is sure of every pixel, and no better: all sampled masks are alike."),
    Rule("masks_look_alike", "entropy", lambda h: -h.median("entropy"), -0.2, None,
         f"The entropy is down to {{0:.2g}} nats per undecided pixel. {_ALIKE}",
         "Raise --entropy_coef or --temperature."),
    Rule("masks_look_alike", "reward_std",
         lambda h: 0.05 * float(np.median(h.first["reward_std"])) - h.median("reward_std"), 0, None,
         f"The rewards of an image's masks differ by {{now:.2g}} only, {{first:.2g}} at the start. {_ALIKE}",
         "Raise --entropy_coef or --temperature."),
    Rule("policy_jumps", "approx_kl", lambda h: h.median("approx_kl"), 5, 20,
         "Each step moves the policy by {0:.2g} (train/approx_kl; below 1 is usual).", _JUMPS),
    Rule("clipped_everywhere", "clipfrac", lambda h: h.median("clipfrac"), 0.5, None,
         "{0:.0%} of the credited pixels leave the clip range within a step and learn nothing more.", _JUMPS),
    Rule("drifts_without_gain", "reward kl_ref",
         lambda h: h.median("kl_ref") if h.rise("reward") <= 0 else -math.inf, 20, None,
         "The policy is far from where it began (train/kl_ref {0:.3g}) and earns no more: {now:.3g}, "
         "{first:.3g} at the start.", "Lower --learning_rate or raise --kl_coef."),
    Rule("correction", "kl_ref", lambda h: h.median("kl_ref"), None, 300,
         "The policy is {0:.3g} away from where it began (train/kl_ref)."),
    Rule("stands_still", "kl_ref approx_kl", lambda h: -max(h.latest["kl_ref"] + h.latest["approx_kl"]),
         -1e-8, None, "The policy has not moved from where it began (train/kl_ref {now:.2g}).",
         "Raise --learning_rate, or add mask_decoder and image_encoder to --lora_scope."),
    Rule("gradient_vanishes", "grad_norm", lambda h: -h.median("grad_norm") or -math.inf, -1e-4, None,
         "The gradient has a norm of only {0:.2g}.",
         "Add mask_decoder and image_encoder to --lora_scope.",
         "Check that the reward differs between masks."),
    Rule("gradient_explodes", "score_size excess_grad_norm",  # before the next: the first is reported
         lambda h: h.median("excess_grad_norm") if h.median("score_size") > HUGE_REWARD else -math.inf,
         100, None, "The gradient's norm is {0:.0f} times --max_grad_norm: rewards have a size of {now:.3g}.",
         "Scale the reward to at most about 10 for a good mask; --learning_rate is not the cause."),
    Rule("gradient_explodes", "excess_grad_norm", lambda h: h.median("excess_grad_norm"), 100, None,
         "The gradient's norm is {0:.0f} times --max_grad_norm: nearly all of it is cut away, and a few "
         "pixels decide.", "Lower --learning_rate."),
    Rule("foreground_runs_away", "foreground", partial(_area, sign=1), math.log(1.5), math.log(3),
         _AREA + "bloat.", "Lower --learning_rate; if they still do, raise --precision_weight."),
    Rule("foreground_runs_away", "foreground", partial(_area, sign=-1), math.log(2), math.log(4),
         _AREA + "shrink.", "Lower --learning_rate; if they still do, raise --recall_weight."),
    *(Rule("one_term_pays", f"reward/{term} reward/dice", partial(_pays, term=term), 0, None,
           f"The reward's {term} term has risen from {{first:.3g}} to {{now:.3g}} while its Dice term has "
           "fallen: overlap pays for it.", f"Lower the weight of the {term} term or raise --dice_weight.")
      for term in ("recall", "precision", "topology", "length", "custom")),
    Rule("correction", "dice", lambda h: -h.rise("dice"), None, 0.2,
         "The Dice of the masks has fallen to {now:.3f}, {first:.3f} at the start."),
    Rule("correction", "greedy_reward", _reward_fall, None, 3,  # standard deviations of the first values
         "The reward of the masks has fallen to {now:.3g}, {first:.3g} at the start."),
    Rule("correction", "loss", _loss_rise, None, math.log(2.5),
         "The loss has risen to {now:.3g}, {first:.3g} at the start."),
    Rule("images_unknown", "", _unknown, 0, None,
         "Before training the Dice is {first[dice]:.3f}: the model does not know such images. Of the pixels "
         "of {fit[images]} validation images {fit[true_foreground]:.1%} are vessel, by the model "
         "{fit[foreground]:.1%}; its Dice there is {fit[dice]:.3f}, that of a Frangi filter "
         "{fit[frangi_dark]:.3f} for dark vessels and {fit[frangi_bright]:.3f} for bright ones.",
         "{fit[teaching]}"),
    Rule("head_alone", "",
         lambda h: h.fit.get("head_alone", -math.inf) - np.nan_to_num(h.validations[-1]["dice"]), -0.005,
         None, "The detail head has a validation Dice of {fit[head_alone]:.3f} without the mask decoder's "
         "logits, {now[dice]:.3f} with them: it does the work alone.",
         "Compare with --control unet_pretrained, which is this head without Sa2VA."),
    Rule("below_start", "", lambda h: -_reward_rise(h, 0, -1), 1, None,
         "The validation reward is {now[reward]:.3f}, below the {first[reward]:.3f} that the run began with.",
         "If it stays there, lower --learning_rate.", "Raising --kl_coef helps, too."),
    Rule("flat", "", _flat, 0, None,
         f"The latest {FLAT_VALIDATIONS} validations, to a reward of {{now[reward]:.3f}}, brought no gain.",
         "Stop here, or lower --learning_rate; if it never rose, raise it, or use more images."),
    Rule("gaming", "", partial(_traded, name="dice"), 0.01, None,
         _TRADE + _FALL.format(name="dice") + ": the reward pays for the wrong thing.",
         "Raise --dice_weight, or lower the weight of the term that rises (train/reward/...)."),
    *(Rule("trading", "", partial(_traded, name=name), 0.05, None, _TRADE + _FALL.format(name=name) + ".",
           f"If that is not the trade you want: {advice}") for name, advice in _ADVICE.items()),
    Rule("correction", "",
         lambda h: h.validations[0]["dice"] - np.nan_to_num(h.validations[-1]["dice"], nan=-1), None, 0.2,
         "The validation Dice has fallen to {now[dice]:.3f}, {first[dice]:.3f} at the start."),
)  # fmt: skip


@dataclass
class Health:
    """Applies the rules to every step and validation of a run: it reports, corrects, and stops.

    An issue is noted once, and again after a window of steps (or one validation) without it. Weights count as
    good once a window of steps has passed without a symptom; until then they are a candidate.
    """

    model: Model
    optimizer: Optimizer | None
    config: TrainConfig
    note: Callable[[Issue], None]
    rate_factor: float = 1.0  # of the learning rate
    num_corrections: int = 0
    last_seen: dict[str, int] = field(default_factory=dict)  # step by code of a rule

    def __post_init__(self) -> None:
        self.good = self.candidate = (0, self.model.values())
        self.history = History()

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step, none where its loss or gradient was not finite."""
        derived = {}  # not hidden while multipliers move: the size of rewards is no measure of progress
        if "train/grad_norm" in metrics:
            derived["train/excess_grad_norm"] = metrics["train/grad_norm"] / self.config.optim.max_grad_norm
        if "train/reward" in metrics:
            derived["train/score_size"] = abs(metrics["train/reward"])
        self.history.add({**metrics, **derived})
        known = {name for name, values in self.history.latest.items() if len(values) == WINDOW}
        rules = [rule for rule in RULES if rule.metrics and known.issuperset(rule.metrics.split())]
        severity = self._apply(rules, step, WINDOW)
        if severity < HEALTHY and step >= self.candidate[0] + WINDOW:
            self.good, self.candidate = self.candidate, (step, self.model.values())

    def after_validation(self, step: int, scores: Mapping[str, float], is_last: bool = False) -> None:
        """Takes the mean scores of a validation; the weights of the last one stay as they were validated."""
        self.history.validations.append(dict(scores))
        self._apply([r for r in RULES if not r.metrics and not (is_last and r.roll_back)], step, 0)

    def _apply(self, rules: list[Rule], step: int, quiet_steps: int) -> float:
        """Corrects and reports; returns the largest severity as a part of its `roll_back` threshold."""
        h, issues, worst = self.history, {}, (0.0, "")
        for rule in rules:
            severity, names = rule.severity(h), rule.metrics.split()
            if severity == -math.inf:
                continue
            now, first = h.validations[-1:], h.validations[:1]
            if names:
                now, first = [h.median(names[0])], [h.start(names[0])]
            sentence = rule.sentence.format(abs(severity), now=now[0], first=first[0], fit=h.fit)
            if rule.report is not None and severity > rule.report:
                advice = f"{rule.advice} {rule.rl_advice * h.is_rl}".strip().format(fit=h.fit)
                issues.setdefault(rule.code, Issue(step, rule.code, sentence, advice))
            is_fresh = all(h.since_roll_back[name] >= WINDOW for name in names)
            if rule.roll_back is not None and is_fresh:
                worst = max(worst, (severity / rule.roll_back, sentence))
        if worst[0] >= 1:
            self.roll_back(step, worst[1])
        for code in {rule.code for rule in rules} - issues.keys():
            if step - self.last_seen.get(code, step) > quiet_steps:
                del self.last_seen[code]
        for code, issue in issues.items():
            if code not in self.last_seen:
                self.note(issue)
            self.last_seen[code] = step
        return worst[0]

    def roll_back(self, step: int, symptom: str) -> None:
        """Returns to the last good weights with half the learning rate, or raises LearningError."""
        good_step, values = self.good
        self.model.restore(values)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.history.since_roll_back = dict.fromkeys(self.history.latest, 0)
        self.candidate = (step, values)
        if self.num_corrections == MAX_CORRECTIONS:
            is_rl = self.history.is_rl
            others = "--kl_coef or --batch_size, or check the reward" if is_rl else "--batch_size"
            raise LearningError(
                f"The run went wrong {MAX_CORRECTIONS + 1} times, although the learning rate was halved each "
                f"time, to {self.rate_factor:.2g} of its setting. At step {step}: {symptom} Lower "
                f"--learning_rate; if that does not help, raise {others}."
            )
        self.num_corrections += 1
        self.rate_factor /= 2
        advice = (
            f"Went back to the adapter of step {good_step} and go on with {self.rate_factor:.2g} of the set "
            f"learning rate (correction {self.num_corrections} of {MAX_CORRECTIONS}). Next time lower "
            "--learning_rate."
        )
        self.note(Issue(step, "correction", symptom, advice))

    def state_dict(self) -> dict[str, Any]:
        """History, corrections so far, and the weights to go back to."""
        names = ("rate_factor", "num_corrections", "good", "candidate", "last_seen")
        return {name: getattr(self, name) for name in names} | {"history": asdict(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores history, corrections and good weights."""
        vars(self).update(state, history=History(**state["history"]))


def take_step(
    model: Model, optimizer: Optimizer, loss: Tensor, max_norm: float, is_first: bool, reward: float = 0.0
) -> tuple[float, float]:
    """Updates the weights by the gradient of a loss, clipped to a norm; returns the loss and that norm.

    Losses and gradients of several processes are summed. Refused are a loss or gradient that is not finite
    and a first gradient that misses a weight. `reward` is the size of the rewards behind the loss.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    processes.sum_gradients(model.trainable.values())
    norm = torch.nn.utils.clip_grad_norm_(model.trainable.values(), max_norm)
    # Fetched from a GPU together, and before the weights change.
    own, norm = torch.stack([loss.detach(), norm.to(loss.device)]).tolist()
    value = math.fsum(processes.gather([own]))
    if not math.isfinite(value):
        raise not_finite(f"The loss is {value}", reward)
    if not math.isfinite(norm):  # clipped by an infinite norm all gradients would be 0, and pass for a step
        raise not_finite(f"The gradient has a norm of {norm}", reward)
    if is_first:
        model.check_gradients()
    optimizer.step()
    return value, norm


def not_finite(fault: str, reward: float) -> LearningError:
    """The error for a step that is not finite; with an absurd reward no smaller learning rate would help."""
    if abs(reward) <= HUGE_REWARD:
        return NotFiniteError(f"{fault}: --learning_rate is probably too high.")
    cause = f"the reward is the cause, with values of {reward:.3g}"
    return LearningError(f"{fault}: {cause}. Scale it to at most about 10 for a good mask.")


def check_moved(distance: float) -> None:
    """Refuses a first update that moved nothing, or to nowhere."""
    if not math.isfinite(distance) or distance == 0:
        raise LearningError(
            f"After the first update the adapter has moved by {distance}. Check --learning_rate (0 teaches "
            "nothing, nan or inf means that it is far too large)."
        )


def check_learned(num_steps: int, distance: float) -> None:
    """Raises LearningError for a run that has ended exactly where it began."""
    if num_steps and distance == 0:
        raise LearningError(
            f"After {num_steps} steps the adapter is exactly where it started: no sampled mask ever earned "
            "more than another, or every change had to be taken back (the log says so). Check the reward (a "
            "constant one teaches nothing) and --learning_rate."
        )
