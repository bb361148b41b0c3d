"""Each symptom is read from a history that has it and from no healthy one; a bad run is taken back."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import metrics_of, train_debug
from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.experiment.config import EMBEDDED_LEARNING_RATE, TrainConfig
from vesselrl.training import supervised
from vesselrl.training.baselines import INVERT, teaching
from vesselrl.training.health import MAX_CORRECTIONS, WINDOW, Health, Issue, take_step
from vesselrl.training.setup import warm_cosine
from vesselrl.training.train import TrainResult

# Metrics as a run that gains has them.
HEALTHY = {
    "train/reward": 3.4, "train/greedy_reward": 3.5, "train/reward_std": 0.05, "train/approx_kl": 0.05,
    "train/kl_ref": 1.0, "train/clipfrac": 0.1, "train/grad_norm": 2.0, "train/entropy": 0.85,
    "train/foreground": 1.05, "train/zero_variance_groups": 0.0, "train/dice": 0.8, "train/reward/dice": 3.9,
    "train/reward/topology": 0.6, "train/policy_loss": 0.1,
}  # fmt: skip
START = {"reward": 3.1, "dice": 0.78, "recall": 0.77, "precision": 0.81, "cldice": 0.77}


class Toy:
    """A model of one weight, whose every step adds 1 to it."""

    kind = "lora"

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=1.0)
        self.issues: list[Issue] = []
        self.health = Health(self, self.optimizer, TrainConfig(), self.issues.append)

    def values(self) -> torch.Tensor:
        return self.weight.detach().clone()

    def restore(self, values: torch.Tensor) -> None:
        self.weight.data.copy_(values)

    def run(self, metrics: Iterable[dict[str, float]], first: int = 1) -> list[Issue]:
        """Takes a step with each of the metrics, as train.py does; returns the issues."""
        for step, figures in enumerate(metrics, start=first):
            self.weight.data += 1
            self.optimizer.state[self.weight] = {"step": 1}
            self.health.after_step(step, figures)
        return self.issues

    def validate(self, *changes: dict[str, float]) -> list[Issue]:
        """Validates before the first step and after some, with changed scores."""
        for number, scores in enumerate(({}, *changes)):
            self.health.after_validation(100 * number, START | scores)
        return self.issues

    @property
    def corrections(self) -> list[Issue]:
        return [issue for issue in self.issues if issue.code == "correction"]


def noisy(count: int) -> list[dict[str, float]]:
    """Healthy metrics over `count` steps, 10 % up and down in turn."""
    return [{name: value * (0.9, 1.1)[k % 2] for name, value in HEALTHY.items()} for k in range(count)]


def diagnose(change: Callable[[float, dict[str, float]], dict[str, float]]) -> list[Issue]:
    """Issues of a run with noise whose metrics are changed by `change(progress from 0 to 1, metrics)`."""
    rng, steps, num_steps = np.random.default_rng(0), [], 3 * WINDOW
    for step in range(num_steps):
        metrics = {name: value * (1 + 0.1 * rng.standard_normal()) for name, value in HEALTHY.items()}
        steps.append(metrics | change(step / (num_steps - 1), metrics))
    return Toy().run(steps, first=0)


# Code, metrics of a run or scores of its validations, words of the symptom and of the advice.
SYMPTOMS = [
    # A policy that is sure and right; it is not corrected.
    ("masks_earn_the_same", lambda p, m: {"train/zero_variance_groups": 1.0, "train/dice": 0.8 + 0.2 * p},
     "100%", "--temperature"),
    ("masks_look_alike", lambda p, m: {"train/entropy": 0.1}, "0.1 nats", "--entropy_coef"),
    ("masks_look_alike", lambda p, m: {"train/reward_std": 0.05 if p < 0.4 else 0.001}, "0.001", "--temp"),
    ("policy_jumps", lambda p, m: {"train/approx_kl": 9.0}, "9", "--learning_rate"),
    ("clipped_everywhere", lambda p, m: {"train/clipfrac": 0.7}, "70%", "--num_passes"),
    ("drifts_without_gain", lambda p, m: {"train/kl_ref": 30, "train/reward": 3.4 - p}, "30", "--kl_coef"),
    ("stands_still", lambda p, m: {"train/kl_ref": 3e-9, "train/approx_kl": -4e-9}, "3e-09", "--lora_scope"),
    ("gradient_vanishes", lambda p, m: {"train/grad_norm": 3e-6}, "3e-06", "--lora_scope"),
    ("gradient_explodes", lambda p, m: {"train/grad_norm": 400.0}, "400 times", "--learning_rate"),
    ("foreground_runs_away", lambda p, m: {"train/foreground": 1 + 1.5 * p}, "bloat", "--precision_weight"),
    ("foreground_runs_away", lambda p, m: {"train/foreground": 1 - 0.7 * p}, "shrink", "--recall_weight"),
    ("one_term_pays", lambda p, m: {"train/reward/topology": 0.6 + p, "train/reward/dice": 4 - p},
     "topology term has risen", "--dice_weight"),
    ("below_start", [{"reward": 2.9}], "2.900", "--learning_rate"),
    ("flat", [{"reward": 3.4}] + [{"reward": 3.38}] * 4, "3.380", "--learning_rate"),
    ("gaming", [{"reward": 3.6, "dice": 0.75}], "0.780 to 0.750", "--dice_weight"),
    ("trading", [{"reward": 3.6, "recall": 0.7}], "recall has fallen from 0.770 to 0.7", "--recall_weight"),
    ("trading", [{"reward": 3.6, "precision": 0.75}], "precision has fallen", "--precision_weight"),
    ("trading", [{"reward": 3.6, "cldice": 0.71}], "cldice has fallen", "--topology_weight"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "history", "words", "option"), SYMPTOMS)
def test_a_symptom_is_reported_once_with_options_that_exist(code, history, words, option) -> None:
    if callable(history):
        (issue,) = diagnose(history)
    else:
        (issue,) = Toy().validate(*history, history[-1])
    assert issue.code == code
    assert words in issue.symptom
    assert option in issue.advice
    options = {word.strip(".,;:") for word in issue.advice.split() if word.startswith("--")}
    assert options <= {f"--{name}" for name in TrainConfig().to_dict()}


BAD = {
    "jump": {"train/approx_kl": 50.0},
    "distance": {"train/kl_ref": 1000.0},
    "bloat": {"train/foreground": 4.0},
    "shrink": {"train/foreground": 0.0},
    "spread": {"train/zero_variance_groups": 1.0, "train/dice": 0.7},
    "infinite": {"train/foreground": math.inf},
    "dice_fall": {"train/dice": 0.5},
    "reward_fall": {"train/greedy_reward": -2.0},
}
SILENT = {
    "gains": lambda p, m: {f"train/{k}": m[f"train/{k}"] + p * gain for k, gain in
                           {"reward": 1, "reward/dice": 0.6, "reward/topology": 0.3, "kl_ref": 13}.items()},
    "a bad step": lambda p, m: {k: v for one in BAD.values() for k, v in one.items() if 0.5 < p < 0.52},
    # Images that differ by 2 in their Dice term; it falls by 0.3 while topology clearly rises.
    "noise of the images": lambda p, m: {"train/reward/dice": 4 + 2 * (-1) ** round(59 * p) - 0.3 * p,
                                         "train/reward/topology": m["train/reward/topology"] + p},
    # An area that hardly shrinks; one that was wrong and comes nearer, or not.
    "smaller": lambda p, m: {"train/foreground": 1 - 0.2 * p},
    "empty": lambda p, m: {"train/foreground": 0.0},
    "nearer": lambda p, m: {"train/foreground": 6 - 4 * p},
    "PPO's loss": lambda p, m: {"train/loss": 0.3 + p},
    "PPO's loss beside a multiplier": lambda p, m: {"train/loss": 0.3 + 9 * p, "train/price/recall": 0.1},
    # The reward's meaning changes from step to step.
    "a moving multiplier": lambda p, m: {"train/reward/topology": 0.6 + p, "train/reward/dice": 4 - p,
                                         "train/kl_ref": 30, "train/reward": 3.4 - p,
                                         "train/greedy_reward": 3.5 - 9 * p, "train/price/recall": p},
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_a_healthy_run_says_nothing_and_is_left_alone(name: str) -> None:
    assert diagnose(SILENT[name]) == []


@pytest.mark.parametrize("symptom", BAD)
def test_a_severe_symptom_takes_the_run_back_to_where_it_was_good(symptom: str) -> None:
    toy = Toy()
    toy.run(noisy(4 * WINDOW) + [HEALTHY | BAD[symptom]] * WINDOW)
    (correction,) = toy.corrections
    # Values of step 60 counted as good when step 80 had passed; those of step 80 never did.
    assert "step 60" in correction.advice
    assert toy.weight.item() == 3 * WINDOW + (5 * WINDOW - correction.step)
    assert toy.health.rate_factor == 0.5


@pytest.mark.parametrize("odd", [[math.inf], [40.0], [math.inf] * 3])
def test_odd_images_at_the_start_do_not_blind_the_area(odd: list[float]) -> None:
    """With one image per step the first value is one image's: infinite, for one without any vessel."""
    toy, first = Toy(), [HEALTHY | {"train/foreground": area} for area in odd]
    toy.run([*first, *noisy(4 * WINDOW), *[HEALTHY | BAD["bloat"]] * WINDOW])
    assert len(toy.corrections) == 1


def test_a_rising_loss_of_a_supervised_run_is_a_symptom() -> None:
    (correction,) = Toy().run([{"train/loss": 0.3}] * 40 + [{"train/loss": 1.2}] * WINDOW)
    assert "0.3 at the start" in correction.symptom


@pytest.mark.parametrize(("dice", "corrections"), [(0.55, 1), (0.65, 0), (math.nan, 1)])
def test_a_fall_of_the_validation_dice_is_a_symptom(dice: float, corrections: int) -> None:
    toy = Toy()
    toy.run(noisy(5))
    toy.validate({"dice": dice})
    assert len(toy.corrections) == corrections
    assert toy.weight.item() == (0 if corrections else 5)
    toy.health.after_validation(200, START | {"dice": 0.1}, is_last=True)
    assert len(toy.corrections) == corrections  # the last weights stay as they were validated


def test_a_run_that_goes_wrong_again_and_again_stops_with_advice() -> None:
    toy = Toy()
    for step in range(MAX_CORRECTIONS):
        toy.run(noisy(3), step)
        toy.health.roll_back(step, "The loss is nan.")
    with pytest.raises(LearningError, match=r"6 times.*The loss is nan.*--learning_rate"):
        toy.health.roll_back(99, "The loss is nan.")
    assert toy.health.num_corrections == len(toy.issues) == MAX_CORRECTIONS
    assert toy.health.rate_factor == 0.5**MAX_CORRECTIONS
    assert toy.weight.item() == 0
    assert len(toy.optimizer.state) == 0  # its moments are forgotten


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e30])  # the square of the last one overflows
def test_a_gradient_whose_norm_is_no_number_is_refused(spoilt: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(NotFiniteError):
        step_along(weight, [spoilt, 0.0])
    assert weight.tolist() == [0, 0]
    assert step_along(weight, [3.0, 4.0]) == 5
    assert weight.tolist() == pytest.approx([-0.6, -0.8])


def step_along(weight: torch.nn.Parameter, gradient: list[float], reward: float = 0.0) -> float:
    """Takes a step of one whose loss is 0 and has this gradient; returns the gradient's norm."""
    model, sgd = SimpleNamespace(trainable={"weight": weight}), torch.optim.SGD([weight], lr=1.0)
    loss = (weight - weight.detach()).sum()
    hook = weight.register_hook(lambda _: torch.tensor(gradient))
    try:
        return take_step(model, sgd, loss, 1.0, is_first=False, reward=reward)[1]
    finally:
        hook.remove()


FIT = {"images": 3, "dice": 0.2, "foreground": 0.64, "true_foreground": 0.08, "frangi_dark": 0.4}
TAUGHT = {"stage": "sft", "detail_head": "pretrained", "augment": "light"}


@pytest.mark.parametrize(
    ("dice", "bright", "settings", "advice"),
    [
        (0.59, 0.1, {}, "it: --stage sft+rl --detail_head pretrained --augment flips --num_epochs 12."),
        (0.1, 0.7, TAUGHT, f"{INVERT} Teach it: --num_epochs 12."),
        (0.1, 0.5, TAUGHT | {"num_epochs": 12}, "This training teaches it: look at the later validations."),
        (0.6, 0.1, {}, None),
    ],
)
def test_a_model_that_does_not_know_the_images_is_told_once_and_what_to_do(
    dice, bright, settings, advice
) -> None:
    """Of 30 images, shown twice an epoch, 12 epochs make 700 passes."""
    toy, fit = Toy(), FIT | {"frangi_bright": bright}
    fit["teaching"] = teaching(TrainConfig().with_(**settings), 30, fit)
    toy.health.history.fit = fit
    for later in (0.0, 0.01):
        toy.health.after_validation(0, START | {"dice": dice + later, "reward": 3.0 + later})
    assert [issue.code for issue in toy.issues] == ["images_unknown"] * (advice is not None)
    for issue in toy.issues:
        assert f"Dice is {dice:.3f}: the model does not know" in issue.symptom
        shares = "3 validation images 8.0% are vessel, by the model 64.0%; its Dice there is 0.2"
        assert shares in issue.symptom
        assert f"filter 0.400 for dark vessels and {bright:.3f} for bright" in issue.symptom
        assert issue.advice.endswith(advice)


@pytest.mark.parametrize(
    ("dice", "codes"), [*((one, ["head_alone"]) for one in (0.85, 0.854, math.nan)), (0.856, [])]
)
def test_a_head_that_does_the_work_alone_is_told(dice: float, codes: list[str]) -> None:
    toy = Toy()
    toy.health.after_validation(0, START)
    toy.health.history.fit["head_alone"] = 0.85
    toy.health.after_validation(100, START | {"dice": dice}, is_last=True)
    assert [issue.code for issue in toy.issues] == codes
    for issue in toy.issues:
        assert f"Dice of 0.850 without the mask decoder's logits, {dice:.3f} with them" in issue.symptom
        assert "--control unet_pretrained" in issue.advice


def test_a_supervised_run_gets_no_advice_about_the_reward() -> None:
    """Its reward may rise while Dice falls: nothing was paid for it."""
    for is_rl in (True, False):
        toy = Toy()
        toy.run([{"train/reward": 3.0} if is_rl else {"train/loss": 0.3}])
        toy.validate({"reward": 3.6, "dice": 0.75, "recall": 0.7}, {"reward": 2.9})
        said = {issue.code: issue.advice for issue in toy.issues}
        assert said.keys() == ({"gaming", "trading"} if is_rl else set()) | {"below_start"}
        assert ("--kl_coef" in said["below_start"]) == is_rl


def test_a_huge_reward_is_named_as_the_cause_and_not_the_learning_rate() -> None:
    for moving in ({}, {"train/price/recall": 1.0}):  # a multiplier
        (issue,) = diagnose(lambda p, m, more=moving: {"train/grad_norm": 4e9, "train/reward": -1e12} | more)
        assert issue.code == "gradient_explodes"
        assert "rewards have a size of 1e+12" in issue.symptom
        assert "--learning_rate is not the cause" in issue.advice
    weight = torch.nn.Parameter(torch.zeros(2))
    causes = ((-1e12, LearningError, "the reward is the cause"), (5.0, NotFiniteError, "rate"))
    for reward, kind, words in causes:
        with pytest.raises(LearningError, match=words) as raised:
            step_along(weight, [1e30, 0.0], reward)
        assert type(raised.value) is kind  # smaller steps would not help: no roll back


def sanity_run(output: Path, monkeypatch: pytest.MonkeyPatch, steps: int, **changes: object) -> TrainResult:
    """A run over the same two images, one each step, without validation at the ends of epochs."""
    monkeypatch.setattr("vesselrl.training.setup.SANITY_STEPS", steps)
    settings = {"sanity_overfit": 2, "batch_size": 1, "num_passes": 2, "val_freq": 1000, "num_workers": 1}
    return train_debug(output, **(settings | changes))


def findings_in(output: Path) -> list[dict]:
    """Those of a run, finished or not, every adapter and metric of which is a number."""
    (folder,) = output.glob("sa2va_lora_ppo_*")
    adapters = list(folder.glob("*/adapter_model.safetensors"))
    assert adapters
    for path in adapters:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values()), path
    for line in metrics_of(folder):
        assert None not in line.values(), line  # nan is written as null
    return json.loads((folder / "diagnosis.json").read_text())["findings"]


def test_a_planted_nan_loss_is_taken_back_and_told(tmp_path, monkeypatch, caplog) -> None:
    calls = []

    def sometimes_nan(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = supervised.mask_loss(*tensors)
        return loss * math.nan if len(calls) == 4 else loss

    monkeypatch.setitem(supervised.SFT_LOSSES, "bce_dice", sometimes_nan)
    result = sanity_run(tmp_path, monkeypatch, steps=6, stage="sft", learning_rate=1e-3, num_passes=1)
    assert findings_in(tmp_path) == result.info["findings"]
    finding = result.info["findings"][0]
    assert (finding["step"], finding["code"]) == (4, "correction")
    assert "The loss is nan" in finding["sign"]
    assert f"step 4, correction: {finding['sign']} {finding['advice']}" in caplog.text
    rates = [line["train/learning_rate"] for line in metrics_of(result.folder) if "train/epoch" in line]
    expected = [1e-3 * warm_cosine(step, 6, warmup_share=0.05) for step in range(6)]
    assert rates == pytest.approx([*expected[:4], 0.5 * expected[4], 0.5 * expected[5]])
    assert result.info["adapter_delta_norm"] > 0
    # It trains and validates on the same images, and tests on none.
    assert result.info["counts"]["train"]["used"] == result.info["counts"]["val"]["used"] == 2
    assert result.test == []


RATE = 4 * EMBEDDED_LEARNING_RATE
LONG = [pytest.mark.long, pytest.mark.timeout(7200)]  # run it with -m long


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (30, {"stage": "rl", "learning_rate": 100.0, "target_kl": 1e9}),  # no trust region
        (30, {"stage": "sft", "learning_rate": 100.0}),
        pytest.param(2500, {"learning_rate": RATE}, marks=LONG, id="tiny"),
        pytest.param(2500, {"learning_rate": RATE, "model_path": None}, marks=LONG, id="embedded"),
    ],
)
def test_a_rate_far_too_high_is_corrected_or_stopped(tmp_path, monkeypatch, steps, settings) -> None:
    """The first steps at a rate of 100 ruin any adapter; what is written is still numbers."""
    with contextlib.suppress(LearningError):  # it may come through slowed down, or stop
        sanity_run(tmp_path, monkeypatch, steps, **settings)
    codes = {finding["code"] for finding in findings_in(tmp_path)}
    assert "correction" in codes or steps > 30


def test_a_rate_far_too_high_is_harmless_within_a_trust_region(tmp_path, monkeypatch) -> None:
    """Every step is shortened; the run ends without a correction."""
    result = sanity_run(tmp_path, monkeypatch, 10, stage="rl", learning_rate=100.0)
    sizes = [line["train/approx_kl"] for line in metrics_of(result.folder) if "train/approx_kl" in line]
    assert len(sizes) == 10
    assert 1e-3 < max(sizes) <= TrainConfig().ppo.target_kl
    assert "correction" not in {finding["code"] for finding in findings_in(tmp_path)}
