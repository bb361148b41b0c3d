"""Settings: flat names for groups, refusals that name the option, stages and rates."""

import dataclasses
import json
from collections import Counter

import pytest

from vesselrl.experiment.config import PRESETS, RANDOM_MODEL, TrainConfig

NAN = float("nan")


def config(**settings: object) -> TrainConfig:
    return TrainConfig().with_(**settings)


def test_settings_have_flat_names_are_changed_by_a_copy_and_survive_json() -> None:
    names = Counter(name for group in dataclasses.asdict(TrainConfig()).values() for name in group)
    assert names == dict.fromkeys(TrainConfig().to_dict(), 1)
    changed = PRESETS["quick"].with_(seed=7, lora_scope=["projector"])
    values = json.loads(json.dumps(changed.to_dict()))
    assert TrainConfig.from_dict(values | {"of_another_version": 1}) == changed != PRESETS["quick"]
    with pytest.raises(TypeError, match="no settings called sede"):
        config(sede=7)


# Settings, their smallest value, one that is too small, and the advice; nan is refused as well.
RANGES = [
    ("num_epochs batch_size num_passes log_freq val_freq save_freq num_workers max_train_samples "
     "max_val_samples lora_rank lora_alpha", 1, 0, "give at least 1"),
    ("num_regions min_component_px sanity_overfit gpu seed split_seed", 0, -1, "give at least 0"),
    ("num_samples", 2, 1, "give at least 2"),
    ("clip temperature max_grad_norm", 1e-9, 0, "give a value above 0"),
    ("kl_coef entropy_coef correlation_px structure_weight weight_decay learning_rate cache_gb", 0, -1e-9,
     "give 0 or more"),
    ("warmup_share close_gaps lora_dropout", 0, -0.1, "give"),
    ("dice_floor", 0, -0.1, "give a Dice from 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "smallest", "small", "advice"), [(name, *row[1:]) for row in RANGES for name in row[0].split()]
)
def test_a_number_out_of_range_is_named(name: str, smallest: float, small: float, advice: str) -> None:
    assert config(**{name: smallest}).to_dict()[name] == smallest
    for value in (small, float("nan")):
        with pytest.raises(ValueError, match=f"^--{name} is {value}; {advice}"):
            config(**{name: value})


@pytest.mark.parametrize(
    ("settings", "num_epochs", "expected"),
    [
        ({"stage": "rl"}, 3, "rl rl rl"),
        ({"control": "unet", "sft_loss": "bce_dice_cldice"}, 2, "sft sft"),
        ({"stage": "sft+rl", "num_epochs": 6}, 6, "sft sft sft sft sft rl"),
        ({"stage": "sft+rl", "num_epochs": 13}, 13, "sft " * 11 + "rl rl"),
        ({"stage": "sft+rl", "num_epochs": 5, "rl_epochs": 3}, 5, "sft sft rl rl rl"),
        # A sanity run has more epochs than the settings say, and the same share of them.
        ({"stage": "sft+rl", "num_epochs": 5, "rl_epochs": 1}, 10, "sft " * 8 + "rl rl"),
        ({"stage": "sft+rl", "num_epochs": 5, "rl_epochs": 1}, 2, "sft rl"),
    ],
)
def test_stage_of_each_epoch(settings: dict, num_epochs: int, expected: str) -> None:
    """A supervised epoch passes over the data as often as PPO over its masks."""
    one, epochs = config(num_passes=4, **settings), range(1, num_epochs + 1)
    assert " ".join(one.stage_of_epoch(epoch, num_epochs) for epoch in epochs) == expected
    passes = [one.passes_of_epoch(epoch, num_epochs) for epoch in epochs]
    assert passes == [{"sft": 4, "rl": 1}[stage] for stage in expected.split()]


@pytest.mark.parametrize(
    ("settings", "supervised", "ppo"),
    [
        ({"model_path": "/models/sa2va", "learning_rate": 0.0}, 0.0, 0.0),  # 0 was asked for
        ({"control": "unet"}, 4e-3, 4e-3),
        ({"control": "unet", "learning_rate": 1e-4}, 1e-4, 1e-4),
        ({"stage": "sft+rl", "learning_rate": 1e-2}, 1e-2, 2.5e-4),  # a fortieth
        ({"stage": "sft+rl", "learning_rate": 1e-2, "rl_learning_rate": 3e-4}, 1e-2, 3e-4),
    ],
)
def test_learning_rate_that_is_used(settings: dict, supervised: float, ppo: float) -> None:
    one = config(**settings)
    assert [one.rate_of_stage(stage) for stage in ("sft", "rl")] == pytest.approx([supervised, ppo])
    for model in (None, RANDOM_MODEL):  # PPO from the base model takes smaller steps than supervision
        rates = [config(stage=s, model_path=model).peak_learning_rate for s in ("rl", "sft", "sft+rl")]
        assert 5e-5 < rates[0] < rates[1] == rates[2]
