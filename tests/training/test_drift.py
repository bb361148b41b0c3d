"""A run that goes wrong is taken back and slowed down, or stopped with words; weights that are no numbers
are never kept."""

import contextlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vesselrl.training.drift import DriftGuard

from vesselrl.data.findings import Finding
from vesselrl.errors import LearningError, NotFiniteError
from vesselrl.experiment.config import EMBEDDED_LEARNING_RATE, get_preset
from vesselrl.training import supervised
from vesselrl.training.batches import warm_cosine
from vesselrl.training.health import MAX_CORRECTIONS, WINDOW
from vesselrl.training.train import TrainResult, train

HEALTHY = {
    "train/reward": 3.4, "train/greedy_reward": 3.5, "train/approx_kl": 0.05, "train/kl_ref": 1.0,
    "train/foreground": 1.0, "train/zero_variance_groups": 0.0, "train/dice": 0.8, "train/policy_loss": 0.1,
}  # fmt: skip
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


class Toy:
    """A learner of one weight, whose every step adds 1 to it; figures come from a list."""

    def __init__(self, figures: Iterable[dict[str, float]]) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trainable = {"weight": self.weight}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=1.0)
        self.findings: list[Finding] = []
        self.guard = DriftGuard(self, self.optimizer, start_dice=0.8, note=self.findings.append)
        self.figures = iter(figures)

    def values(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach().clone()}

    def restore(self, values: dict[str, torch.Tensor]) -> None:
        self.weight.data.copy_(values["weight"])

    def step(self, batch: object) -> dict[str, float]:
        self.weight.data += 1
        self.optimizer.state[self.weight] = {"step": 1}
        figures = next(self.figures)
        if isinstance(figures, Exception):
            raise figures
        return figures

    def run(self, first: int = 1) -> None:
        """Steps until the figures are used up."""
        for number, figures in enumerate(list(self.figures), start=first):
            self.figures = iter([figures])
            self.guard.step(number, self, None)


def noisy(figures: dict[str, float], count: int) -> list[dict[str, float]]:
    """The figures over `count` steps, 10 % up and down in turn."""
    return [{name: value * (0.9, 1.1)[k % 2] for name, value in figures.items()} for k in range(count)]


def test_a_healthy_run_is_left_alone() -> None:
    toy = Toy(noisy(HEALTHY, 100))
    toy.run()
    assert toy.weight.item() == 100
    assert toy.guard.rate_factor == 1
    assert toy.findings == []


@pytest.mark.parametrize("sign", BAD)
def test_a_severe_sign_takes_the_run_back_to_where_it_was_good(sign: str) -> None:
    toy = Toy(noisy(HEALTHY, 4 * WINDOW) + [HEALTHY | BAD[sign]] * WINDOW)
    toy.run()
    (finding,) = toy.findings
    assert finding.code == "correction"
    # Values of step 60 counted as good when step 80 had passed; those of step 80 never did.
    assert "step 60" in finding.advice
    assert toy.weight.item() == 3 * WINDOW + (5 * WINDOW - finding.step)
    assert toy.guard.rate_factor == 0.5


@pytest.mark.parametrize("odd", [[math.inf], [40.0], [math.inf] * 3])
def test_odd_images_at_the_start_do_not_blind_the_area(odd: list[float]) -> None:
    """With one image per step the first figure is one image's: infinite, for one without any vessel."""
    first = [HEALTHY | {"train/foreground": area} for area in odd]
    toy = Toy([*first, *noisy(HEALTHY, 4 * WINDOW), *[HEALTHY | BAD["bloat"]] * WINDOW])
    toy.run()
    assert [finding.code for finding in toy.findings] == ["correction"]


def test_masks_that_were_far_too_large_at_the_start_may_come_nearer() -> None:
    toy = Toy(noisy(HEALTHY | {"train/foreground": 6.0}, 5) + noisy(HEALTHY | {"train/foreground": 4.0}, 60))
    toy.run()
    assert toy.findings == []


@pytest.mark.parametrize("cut", [3 * WINDOW + 5, 4 * WINDOW + 5, 5 * WINDOW])
def test_after_an_interruption_the_run_is_taken_back_as_without_it(cut: int) -> None:
    figures = noisy(HEALTHY, 4 * WINDOW) + [HEALTHY | BAD["jump"]] * WINDOW + noisy(HEALTHY, WINDOW)
    whole, before, after = Toy(figures), Toy(figures[:cut]), Toy(figures[cut:])
    whole.run()
    before.run()
    after.restore(before.values())
    after.guard.load_state_dict(before.guard.state_dict())
    after.run(cut + 1)
    assert len(whole.findings) == 2  # the bad steps, and their last few among healthy ones
    assert before.findings + after.findings == whole.findings
    assert after.values() == whole.values()
    assert after.guard.state_dict() == whole.guard.state_dict()


def test_the_moments_of_the_optimizer_are_forgotten() -> None:
    toy = Toy([NotFiniteError("The loss is nan.")])
    toy.run()
    assert len(toy.optimizer.state) == 0


def test_one_bad_step_changes_nothing() -> None:
    spoilt = {name: value for signs in BAD.values() for name, value in signs.items()}
    toy = Toy([*noisy(HEALTHY, 50), HEALTHY | spoilt, *noisy(HEALTHY, 49)])
    toy.run()
    assert toy.findings == []


def test_a_rising_loss_of_a_supervised_run_is_a_sign_and_that_of_ppo_is_none() -> None:
    losses = [{"train/loss": 0.3}] * 40 + [{"train/loss": 1.2}] * 40
    toy = Toy(losses)
    toy.run()
    assert "0.3 at the start" in toy.findings[0].sign
    toy = Toy([HEALTHY | figures for figures in losses])
    toy.run()
    assert toy.findings == []


def test_a_reward_whose_prices_move_is_no_sign() -> None:
    """The constrained objective raises a price until its goal is met; the reward falls by that alone."""
    toy = Toy([*noisy(HEALTHY, 40), *[HEALTHY | BAD["reward_fall"] | {"train/price/recall": 9.0}] * 40])
    toy.run()
    assert toy.findings == []


def test_a_policy_that_is_sure_and_right_is_left_alone() -> None:
    sure = {"train/zero_variance_groups": 1.0, "train/dice": 1.0}
    toy = Toy([*noisy(HEALTHY, 40), *[HEALTHY | sure] * 40])
    toy.run()
    assert toy.findings == []


@pytest.mark.parametrize(("dice", "corrections"), [(0.55, 1), (0.65, 0), (math.nan, 1)])
def test_a_fall_of_the_validation_dice_is_a_sign(dice: float, corrections: int) -> None:
    toy = Toy(noisy(HEALTHY, 5))
    toy.run()
    toy.guard.after_validation(5, dice)
    assert toy.guard.num_corrections == corrections
    assert toy.weight.item() == (0 if corrections else 5)


def test_a_run_that_goes_wrong_again_and_again_stops_with_advice() -> None:
    toy = Toy([NotFiniteError("The loss is nan.")] * (MAX_CORRECTIONS + 1))
    with pytest.raises(LearningError, match=r"6 times.*The loss is nan.*--learning_rate"):
        toy.run()
    assert toy.guard.num_corrections == len(toy.findings) == MAX_CORRECTIONS
    assert toy.guard.rate_factor == 0.5**MAX_CORRECTIONS
    assert toy.weight.item() == 0


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_an_optimizer_that_is_watched_refuses_a_gradient_that_is_no_number(spoilt: float) -> None:
    toy = Toy([])
    toy.weight.grad = torch.full((1,), spoilt)
    with pytest.raises(NotFiniteError):
        toy.optimizer.step()
    assert toy.weight.item() == 0
    toy.weight.grad = torch.ones(1)
    toy.optimizer.step()
    assert toy.weight.item() != 0


# ---- In a training


def sanity_run(output: Path, monkeypatch: pytest.MonkeyPatch, steps: int, **changes: object) -> TrainResult:
    """A run over the same two images, one each step, without validation at the ends of epochs."""
    monkeypatch.setattr("vesselrl.training.run_data.SANITY_STEPS", steps)
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
    assert finding["step"] == 4
    assert finding["code"] == "correction"
    assert "The loss is nan" in finding["sign"]
    rates = [
        line["train/learning_rate"]
        for line in map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
        if "train/learning_rate" in line
    ]
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


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("model", ["random", None], ids=["tiny", "embedded"])
def test_5000_updates_at_four_times_the_learning_rate(tmp_path, monkeypatch, model: str | None) -> None:
    """The long run: `python -m pytest tests/training/test_drift.py -m slow -k tiny` (or `-k embedded`)."""
    with contextlib.suppress(LearningError):  # it may come through slowed down, or stop
        sanity_run(
            tmp_path, monkeypatch, steps=2500, model_path=model, learning_rate=4 * EMBEDDED_LEARNING_RATE
        )
    assert_only_numbers(tmp_path)
