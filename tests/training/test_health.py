"""Each symptom is read from a history that has it and from no healthy one; a bad run is taken back."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.experiment.config import EMBEDDED_LEARNING_RATE, TrainConfig, get_preset
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.training import supervised
from vesselrl.training.health import (
    FLAT_VALIDATIONS,
    MAX_CORRECTIONS,
    RULES,
    WINDOW,
    Health,
    Issue,
    clip_gradients,
)
from vesselrl.training.logging import Monitor
from vesselrl.training.setup import warm_cosine
from vesselrl.training.train import TrainResult, train

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

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=1.0)
        self.issues: list[Issue] = []
        self.health = Health(self, self.optimizer, 1.0, self.issues.append)

    def values(self) -> torch.Tensor:
        return self.weight.detach().clone()

    def restore(self, values: torch.Tensor) -> None:
        self.weight.data.copy_(values)

    def run(self, metrics: Iterable[dict[str, float] | Exception], first: int = 1) -> list[Issue]:
        """Takes a step with each of the metrics, as train.py does; returns the issues."""
        for step, figures in enumerate(metrics, start=first):
            self.weight.data += 1
            self.optimizer.state[self.weight] = {"step": 1}
            if isinstance(figures, Exception):
                self.health.roll_back(step, str(figures))
                figures = {}
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


def noisy(count: int, metrics: dict[str, float] = HEALTHY) -> list[dict[str, float]]:
    """The metrics over `count` steps, 10 % up and down in turn."""
    return [{name: value * (0.9, 1.1)[k % 2] for name, value in metrics.items()} for k in range(count)]


# ---- Reports


def diagnose(change: Callable[[float, dict[str, float]], dict[str, float]]) -> list[Issue]:
    """Issues of a run with noise whose metrics are changed by `change(progress from 0 to 1, metrics)`."""
    rng, steps, num_steps = np.random.default_rng(0), [], 3 * WINDOW
    for step in range(num_steps):
        metrics = {name: value * (1 + 0.1 * rng.standard_normal()) for name, value in HEALTHY.items()}
        steps.append(metrics | change(step / (num_steps - 1), metrics))
    return Toy().run(steps, first=0)


STEP_SYMPTOMS = {
    "masks_earn_the_same": (lambda p, m: {"train/zero_variance_groups": 0.8}, "80%", "--temperature"),
    "masks_look_alike": (lambda p, m: {"train/entropy": 0.1}, "0.1 nats", "--entropy_coef"),
    "policy_jumps": (lambda p, m: {"train/approx_kl": 9.0}, "9", "--learning_rate"),
    "clipped_everywhere": (lambda p, m: {"train/clipfrac": 0.7}, "70%", "--num_passes"),
    "drifts_without_gain": (
        lambda p, m: {"train/kl_ref": 30 + 30 * p, "train/reward": 3.4 - p}, "kl_ref", "--kl_coef"
    ),
    "stands_still": (
        lambda p, m: {"train/kl_ref": 3e-9, "train/approx_kl": -4e-9}, "3e-09", "--lora_scope"
    ),
    "gradient_vanishes": (lambda p, m: {"train/grad_norm": 3e-6}, "3e-06", "--lora_scope"),
    "gradient_explodes": (lambda p, m: {"train/grad_norm": 400.0}, "400 times", "--learning_rate"),
    "foreground_runs_away": (lambda p, m: {"train/foreground": 1 + 1.5 * p}, "bloat", "--precision_weight"),
    "one_term_pays": (
        lambda p, m: {"train/reward/dice": m["train/reward/dice"] - p,
                      "train/reward/topology": m["train/reward/topology"] + p},
        "topology term has risen", "--dice_weight",
    ),
}  # fmt: skip
VALIDATION_SYMPTOMS = {
    "below_start": ([{"reward": 2.9}], "2.900", "--learning_rate"),
    "flat": ([{"reward": 3.4}] + [{"reward": 3.38}] * FLAT_VALIDATIONS, "3.380", "--learning_rate"),
    "gaming": ([{"reward": 3.6, "dice": 0.75}], "0.780 to 0.750", "--dice_weight"),
    "trading": (
        [{"reward": 3.6, "recall": 0.70}],
        "recall has fallen from 0.770 to 0.700",
        "--recall_weight",
    ),
}


@pytest.mark.parametrize("code", [*STEP_SYMPTOMS, *VALIDATION_SYMPTOMS])
def test_a_symptom_is_reported_once_in_words_with_an_option_that_exists(code: str) -> None:
    if code in STEP_SYMPTOMS:
        change, words, option = STEP_SYMPTOMS[code]
        (issue,) = diagnose(change)
        assert issue.step >= WINDOW - 1
    else:
        scores, words, option = VALIDATION_SYMPTOMS[code]
        (issue,) = Toy().validate(*scores, scores[-1])
    assert issue.code == code
    assert words in issue.symptom
    assert option in issue.advice
    options = {word.strip(".,;:") for word in issue.advice.split() if word.startswith("--")}
    assert options <= {f"--{name}" for name in TrainConfig().to_dict()}


def test_every_rule_has_a_history_here() -> None:
    assert {rule.code for rule in RULES} == {*STEP_SYMPTOMS, *VALIDATION_SYMPTOMS, "correction"}


SILENT = {
    "gains": lambda p, m: {f"train/{k}": m[f"train/{k}"] + p * gain for k, gain in
                           {"reward": 1, "reward/dice": 0.6, "reward/topology": 0.3, "kl_ref": 13}.items()},
    "one noisy step": lambda p, m: {"train/approx_kl": 1e6, "train/kl_ref": 1e6, "train/grad_norm": 1e9,
                                    "train/clipfrac": 1.0} if 0.5 < p < 0.52 else {},
    # Images that differ by 2 in their Dice term; it falls by 0.3 while topology clearly rises.
    "noise of the images": lambda p, m: {"train/reward/dice": 4 + 2 * (-1) ** round(59 * p) - 0.3 * p,
                                         "train/reward/topology": m["train/reward/topology"] + p},
    # The reward's meaning changes from step to step.
    "a moving multiplier": lambda p, m: STEP_SYMPTOMS["one_term_pays"][0](p, m) | {"train/price/recall": p},
    "the same, far": lambda p, m: STEP_SYMPTOMS["drifts_without_gain"][0](p, m) | {"train/price/recall": p},
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_a_healthy_run_says_nothing(name: str) -> None:
    assert diagnose(SILENT[name]) == []


@pytest.mark.parametrize(
    ("start", "end", "fires"), [(1.0, 0.3, True), (1.0, 0.8, False), (0.0, 0.0, False), (5.0, 2.0, False)]
)
def test_the_area_is_judged_against_its_start(start: float, end: float, fires: bool) -> None:
    """Shrinking from the true area is a symptom; an area that was wrong and comes nearer is none."""
    found = diagnose(lambda p, m: {"train/foreground": start + p * (end - start)})
    assert [issue.code for issue in found] == ["foreground_runs_away"] * fires


def test_samples_that_lose_their_spread_are_seen_by_their_rewards() -> None:
    (found,) = diagnose(lambda p, m: {"train/reward_std": 0.05 if p < 0.4 else 0.001})
    assert found.code == "masks_look_alike"


def test_a_symptom_that_cleared_is_reported_again() -> None:
    jumps = [(step // (2 * WINDOW)) % 2 == 0 for step in range(6 * WINDOW)]
    found = Toy().run([{"train/approx_kl": 9.0 if jump else 0.1} for jump in jumps], first=0)
    assert [issue.step for issue in found] == [WINDOW - 1, 4 * WINDOW + WINDOW // 2]


@pytest.mark.parametrize("name", ["precision", "recall", "cldice"])
def test_each_score_that_is_traded_is_named(name: str) -> None:
    (found,) = Toy().validate({"reward": 3.6, name: START[name] - 0.06})
    assert found.code == "trading"
    assert name in found.symptom
    small = [
        {"reward": 3.1 + 0.1 * k, "dice": 0.78 + 0.004 * k, name: START[name] - 0.004 * k} for k in range(8)
    ]
    assert Toy().validate(*small) == []


def test_issues_reach_the_log_and_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Monitor(RunFolder(tmp_path), get_preset("debug")) as monitor:
        assert json.loads((tmp_path / "diagnosis.json").read_text()) == {"findings": []}
        monitor.note(Issue(50, "below_start", "It fell.", "Lower it."))
    (entry,) = json.loads((tmp_path / "diagnosis.json").read_text())["findings"]
    assert entry == {"step": 50, "code": "below_start", "sign": "It fell.", "advice": "Lower it."}
    assert "step 50, below_start: It fell. Lower it." in caplog.text


# ---- Corrections

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


@pytest.mark.parametrize("symptom", BAD)
def test_a_severe_symptom_takes_the_run_back_to_where_it_was_good(symptom: str) -> None:
    toy = Toy()
    toy.run(noisy(4 * WINDOW) + [HEALTHY | BAD[symptom]] * WINDOW)
    (correction,) = toy.corrections
    # Values of step 60 counted as good when step 80 had passed; those of step 80 never did.
    assert "step 60" in correction.advice
    assert toy.weight.item() == 3 * WINDOW + (5 * WINDOW - correction.step)
    assert toy.health.rate_factor == 0.5


LEFT_ALONE = {
    "healthy": noisy(100),
    "a bad step": [*noisy(50), HEALTHY | {k: v for one in BAD.values() for k, v in one.items()}, *noisy(9)],
    "far too large at the start": noisy(5, HEALTHY | {"train/foreground": 6.0})
    + noisy(60, HEALTHY | {"train/foreground": 4.0}),
    "PPO's loss": [HEALTHY | {"train/loss": 0.3}] * 40 + [HEALTHY | {"train/loss": 1.2}] * 40,
    "a reward whose multipliers move": [
        *noisy(40), *[HEALTHY | BAD["reward_fall"] | {"train/price/recall": 9.0}] * 40
    ],
    "sure and right": [*noisy(40), *[HEALTHY | {"train/zero_variance_groups": 1.0, "train/dice": 1.0}] * 40],
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_runs_are_left_alone(name: str) -> None:
    toy = Toy()
    toy.run(LEFT_ALONE[name])
    assert toy.corrections == []
    assert toy.weight.item() == len(LEFT_ALONE[name])
    assert toy.health.rate_factor == 1


@pytest.mark.parametrize("odd", [[math.inf], [40.0], [math.inf] * 3])
def test_odd_images_at_the_start_do_not_blind_the_area(odd: list[float]) -> None:
    """With one image per step the first value is one image's: infinite, for one without any vessel."""
    toy = Toy()
    first = [HEALTHY | {"train/foreground": area} for area in odd]
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


@pytest.mark.parametrize("cut", [3 * WINDOW + 5, 4 * WINDOW + 5, 5 * WINDOW])
def test_after_an_interruption_the_run_is_taken_back_as_without_it(cut: int) -> None:
    metrics = noisy(4 * WINDOW) + [HEALTHY | BAD["jump"]] * WINDOW + noisy(WINDOW)
    whole, before, after = Toy(), Toy(), Toy()
    whole.run(metrics)
    before.run(metrics[:cut])
    after.restore(before.values())
    after.health.load_state_dict(before.health.state_dict())
    after.run(metrics[cut:], cut + 1)
    assert len(whole.corrections) == 2  # the bad steps, and their last few among healthy ones
    assert before.issues + after.issues == whole.issues
    assert after.values() == whole.values()
    assert after.health.state_dict() == whole.health.state_dict()


def test_a_run_that_goes_wrong_again_and_again_stops_with_advice() -> None:
    toy = Toy()
    with pytest.raises(LearningError, match=r"6 times.*The loss is nan.*--learning_rate"):
        toy.run([NotFiniteError("The loss is nan.")] * (MAX_CORRECTIONS + 1))
    assert toy.health.num_corrections == len(toy.issues) == MAX_CORRECTIONS
    assert toy.health.rate_factor == 0.5**MAX_CORRECTIONS
    assert toy.weight.item() == 0
    assert len(toy.optimizer.state) == 0  # its moments are forgotten


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e30])  # the square of the last one overflows
def test_a_gradient_whose_norm_is_no_number_is_refused(spoilt: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([spoilt, 0.0])
    with pytest.raises(NotFiniteError):
        clip_gradients([weight], 1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([weight], 1.0) == 5
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8])


def test_a_huge_reward_is_named_as_the_cause_and_not_the_learning_rate() -> None:
    (issue,) = diagnose(lambda p, m: {"train/grad_norm": 4e9, "train/reward": -1e12})
    assert issue.code == "gradient_explodes"
    assert "because the reward is -1e+12" in issue.symptom
    assert "--learning_rate is not the cause" in issue.advice
    weight = torch.nn.Parameter(torch.zeros(2))
    for reward, kind, words in (
        (-1e12, LearningError, "the reward is the cause"),
        (5.0, NotFiniteError, "rate"),
    ):
        weight.grad = torch.tensor([1e30, 0.0])
        with pytest.raises(LearningError, match=words) as raised:
            clip_gradients([weight], 1.0, reward)
        assert type(raised.value) is kind  # smaller steps would not help: no roll back


# ---- In a training


def sanity_run(output: Path, monkeypatch: pytest.MonkeyPatch, steps: int, **changes: object) -> TrainResult:
    """A run over the same two images, one each step, without validation at the ends of epochs."""
    monkeypatch.setattr("vesselrl.training.setup.SANITY_STEPS", steps)
    settings = {"sanity_overfit": 2, "batch_size": 1, "num_passes": 2, "val_freq": 1000, "num_workers": 1}
    return train(get_preset("debug", output_dir=str(output), **(settings | changes)), ["vesselrl", "train"])


def assert_only_numbers(output: Path) -> None:
    """Every adapter that was written holds numbers, and so does every logged loss and KL."""
    adapters = list(output.glob("sa2va_lora_ppo_*/*/adapter_model.safetensors"))
    assert adapters
    for path in adapters:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values()), path
    (metrics,) = output.glob("sa2va_lora_ppo_*/metrics.jsonl")
    for line in metrics.read_text().splitlines():
        assert None not in json.loads(line).values(), line  # nan is written as null


def test_a_planted_nan_loss_is_taken_back_and_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def sometimes_nan(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = supervised.mask_loss(*tensors)
        return loss * math.nan if len(calls) == 4 else loss

    monkeypatch.setitem(supervised.SFT_LOSSES, "bce_dice", sometimes_nan)
    result = sanity_run(tmp_path, monkeypatch, steps=6, stage="sft", learning_rate=1e-3, num_passes=1)
    finding = result.info["findings"][0]
    assert (finding["step"], finding["code"]) == (4, "correction")
    assert "The loss is nan" in finding["sign"]
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    rates = [line["train/learning_rate"] for line in lines if "train/learning_rate" in line]
    expected = [1e-3 * warm_cosine(step, 6, warmup_share=0.05) for step in range(6)]
    assert rates == pytest.approx([*expected[:4], 0.5 * expected[4], 0.5 * expected[5]])
    assert result.info["adapter_delta_norm"] > 0
    assert_only_numbers(tmp_path)


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_an_absurd_learning_rate_is_corrected_or_stopped(tmp_path, monkeypatch, stage: str) -> None:
    """The first steps at a rate of 100 ruin any adapter; what is written is still numbers."""
    with contextlib.suppress(LearningError):  # it may come through slowed down, or stop
        sanity_run(tmp_path, monkeypatch, steps=30, stage=stage, learning_rate=100.0)
    (file,) = tmp_path.glob("sa2va_lora_ppo_*/diagnosis.json")
    assert [f for f in json.loads(file.read_text())["findings"] if f["code"] == "correction"]
    assert_only_numbers(tmp_path)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("model", ["random", None], ids=["tiny", "embedded"])
def test_5000_updates_at_four_times_the_learning_rate(tmp_path, monkeypatch, model: str | None) -> None:
    """The long run: `python -m pytest tests/training/test_health.py -m long -k tiny` (or `-k embedded`)."""
    rate = 4 * EMBEDDED_LEARNING_RATE
    with contextlib.suppress(LearningError):  # it may come through slowed down, or stop
        sanity_run(tmp_path, monkeypatch, steps=2500, model_path=model, learning_rate=rate)
    assert_only_numbers(tmp_path)
