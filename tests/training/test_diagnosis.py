"""Each sign is read from a history that has it and from no healthy one, once, and in words."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from vesselrl.training.diagnosis import STEP_RULES, VALIDATION_RULES, Diagnosis

from vesselrl.data.findings import Finding
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.training.health import FLAT_VALIDATIONS, WINDOW
from vesselrl.training.logging import Monitor

NUM_STEPS = 3 * WINDOW
# Figures as a run that gains has them; the noise is that of its images.
HEALTHY = {
    "train/reward": 3.4, "train/reward_std": 0.05, "train/zero_variance_groups": 0.0, "train/approx_kl": 0.05,
    "train/kl_ref": 1.0, "train/clipfrac": 0.1, "train/grad_norm": 2.0, "train/entropy": 0.85,
    "train/foreground": 1.05, "train/reward/dice": 3.9, "train/reward/topology": 0.6,
}  # fmt: skip
START = {"reward": 3.1, "dice": 0.78, "recall": 0.77, "precision": 0.81, "cldice": 0.77}


def diagnose_steps(change: Callable[[float, dict[str, float]], dict[str, float]]) -> list[Finding]:
    """Findings over a run whose figures are changed by `change(progress from 0 to 1, figures)`."""
    rng = np.random.default_rng(0)
    diagnosis, found = Diagnosis(max_grad_norm=1.0), []
    for step in range(NUM_STEPS):
        noisy = {name: value * (1 + 0.1 * rng.standard_normal()) for name, value in HEALTHY.items()}
        found += diagnosis.after_step(step, noisy | change(step / (NUM_STEPS - 1), noisy))
    return found


def diagnose_validations(*changes: dict[str, float]) -> list[Finding]:
    diagnosis, found = Diagnosis(), []
    for number, scores in enumerate(({}, *changes)):
        found += diagnosis.after_validation(100 * number, START | scores)
    return found


STEP_SIGNS = {
    "masks_earn_the_same": (lambda p, f: {"train/zero_variance_groups": 0.8}, "80%", "--temperature"),
    "masks_look_alike": (lambda p, f: {"train/entropy": 0.1}, "0.1 nats", "--entropy_coef"),
    "policy_jumps": (lambda p, f: {"train/approx_kl": 9.0}, "9", "--learning_rate"),
    "clipped_everywhere": (lambda p, f: {"train/clipfrac": 0.7}, "70%", "--num_passes"),
    "drifts_without_gain": (
        lambda p, f: {"train/kl_ref": 30 + 30 * p, "train/reward": 3.4 - p}, "kl_ref", "--kl_coef"
    ),
    "stands_still": (
        lambda p, f: {"train/kl_ref": 3e-9, "train/approx_kl": -4e-9}, "3e-09", "--lora_scope"
    ),
    "gradient_vanishes": (lambda p, f: {"train/grad_norm": 3e-6}, "3e-06", "--lora_scope"),
    "gradient_explodes": (lambda p, f: {"train/grad_norm": 400.0}, "400 times", "--learning_rate"),
    "foreground_runs_away": (lambda p, f: {"train/foreground": 1 + 2 * p}, "bloat", "--precision_weight"),
    "one_term_pays": (
        lambda p, f: {"train/reward/dice": f["train/reward/dice"] - p,
                      "train/reward/topology": f["train/reward/topology"] + p},
        "topology term has risen", "--dice_weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", STEP_SIGNS)
def test_a_step_sign_is_seen_once_and_said_in_words(code: str) -> None:
    change, words, option = STEP_SIGNS[code]
    found = diagnose_steps(change)
    assert [finding.code for finding in found] == [code]
    assert words in found[0].sign
    assert option in found[0].advice
    assert found[0].step >= WINDOW - 1


def test_every_rule_has_a_history_here() -> None:
    assert set(STEP_SIGNS) == {*STEP_RULES, "gradient_explodes"}
    assert set(VALIDATION_SIGNS) == set(VALIDATION_RULES)


def test_a_healthy_run_says_nothing() -> None:
    gains = {
        "train/reward": 1.0,
        "train/reward/dice": 0.6,
        "train/reward/topology": 0.3,
        "train/kl_ref": 13.0,
    }
    found = diagnose_steps(lambda p, f: {name: f[name] + p * gain for name, gain in gains.items()})
    assert found == []


def test_one_noisy_step_says_nothing() -> None:
    def burst(progress: float, figures: dict[str, float]) -> dict[str, float]:
        spoilt = {"train/approx_kl": 1e6, "train/kl_ref": 1e6, "train/grad_norm": 1e9, "train/clipfrac": 1.0}
        return spoilt if 0.5 < progress < 0.52 else {}

    assert diagnose_steps(burst) == []


def test_a_fall_of_dice_within_the_noise_of_the_images_says_nothing() -> None:
    """Images that differ by 2 in their Dice term; it falls by 0.3 while topology clearly rises."""
    steps = iter(range(NUM_STEPS))
    assert not diagnose_steps(
        lambda p, f: {
            "train/reward/dice": 4 + 2 * (-1) ** next(steps) - 0.3 * p,
            "train/reward/topology": f["train/reward/topology"] + p,
        }
    )


@pytest.mark.parametrize(
    ("start", "end", "fires"), [(1.0, 0.3, True), (1.0, 0.8, False), (0.0, 0.0, False), (5.0, 2.0, False)]
)
def test_the_area_is_judged_against_its_start(start: float, end: float, fires: bool) -> None:
    """Shrinking from the true area is a sign; an area that was wrong and comes nearer is none."""
    found = diagnose_steps(lambda p, f: {"train/foreground": start + p * (end - start)})
    assert [finding.code for finding in found] == ["foreground_runs_away"] * fires


def test_samples_that_lose_their_spread_are_seen_by_their_rewards() -> None:
    (found,) = diagnose_steps(lambda p, f: {"train/reward_std": 0.05 if p < 0.4 else 0.001})
    assert found.code == "masks_look_alike"


def test_a_reward_whose_prices_move_is_not_compared() -> None:
    signs = [STEP_SIGNS[code][0] for code in ("one_term_pays", "drifts_without_gain")]
    for change in signs:
        assert not diagnose_steps(lambda p, f, change=change: change(p, f) | {"train/price/recall": 4 + p})


def test_a_sign_that_cleared_is_reported_again() -> None:
    diagnosis, found = Diagnosis(), []
    for step in range(6 * WINDOW):
        jumps = (step // (2 * WINDOW)) % 2 == 0
        found += diagnosis.after_step(step, {"train/approx_kl": 9.0 if jumps else 0.1})
    assert [finding.step for finding in found] == [WINDOW - 1, 4 * WINDOW + WINDOW // 2]


VALIDATION_SIGNS = {
    "below_start": ([{"reward": 2.9}], "2.900", "--learning_rate"),
    "flat": ([{"reward": 3.4}] + [{"reward": 3.38}] * FLAT_VALIDATIONS, "3.400", "--learning_rate"),
    "gaming": ([{"reward": 3.6, "dice": 0.75}], "0.780 to 0.750", "--dice_weight"),
    "trading": (
        [{"reward": 3.6, "recall": 0.70}],
        "recall has fallen from 0.770 to 0.700",
        "--recall_weight",
    ),
}


@pytest.mark.parametrize("code", VALIDATION_SIGNS)
def test_a_validation_sign_is_seen_once_and_said_in_words(code: str) -> None:
    scores, words, option = VALIDATION_SIGNS[code]
    found = diagnose_validations(*scores, scores[-1])
    assert [finding.code for finding in found] == [code]
    assert words in found[0].sign
    assert option in found[0].advice


def test_a_gain_that_costs_a_little_precision_says_nothing() -> None:
    rising = [
        {"reward": 3.1 + 0.1 * k, "dice": 0.78 + 0.004 * k, "precision": 0.81 - 0.004 * k} for k in range(8)
    ]
    assert diagnose_validations(*rising) == []


@pytest.mark.parametrize("name", ["precision", "recall", "cldice"])
def test_each_score_that_is_traded_is_named(name: str) -> None:
    (found,) = diagnose_validations({"reward": 3.6, name: START[name] - 0.06})
    assert found.code == "trading"
    assert name in found.sign


def test_the_advice_names_options_that_exist() -> None:
    found = [f for change, _, _ in STEP_SIGNS.values() for f in diagnose_steps(change)]
    found += [f for scores, _, _ in VALIDATION_SIGNS.values() for f in diagnose_validations(*scores)]
    words = " ".join(f"{finding.sign} {finding.advice}" for finding in found).split()
    options = {word.strip(".,;:").removeprefix("--") for word in words if word.startswith("--")}
    assert options
    assert options <= set(TrainConfig.__dataclass_fields__)


def test_findings_reach_the_log_and_a_file(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    with Monitor(RunFolder(tmp_path), total_steps=1) as monitor:
        assert json.loads((tmp_path / "diagnosis.json").read_text()) == {"findings": []}
        monitor.log_validation(0, START)
        monitor.log_validation(50, START | {"reward": 2.0})
    (entry,) = json.loads((tmp_path / "diagnosis.json").read_text())["findings"]
    assert entry["code"] == "below_start"
    assert entry["step"] == 50
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert entry["sign"] in record.getMessage()
    assert entry["advice"] in record.getMessage()
