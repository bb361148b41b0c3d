"""Settings: the prototype's defaults, refusals that name the option, presets, stages, learning rates."""

import dataclasses
import json

import pytest

from vesselrl.experiment.config import PRESETS, RANDOM_MODEL, TrainConfig, get_preset

# As the prototype's documentation lists them.
PROTOTYPE = {
    "lora_preset": "medium", "num_epochs": 3, "weight_decay": 0.01, "reward_type": "multi_objective",
    "dice_weight": 0.5, "recall_weight": 0.2, "topology_weight": 0.2, "length_weight": 0.1,
    "recall_target": 0.85,
    "prompt": "Please segment the blood vessel.", "log_freq": 10, "val_freq": 100, "save_freq": 1, "gpu": 0,
}  # fmt: skip


def test_defaults_are_those_of_the_prototype() -> None:
    settings = TrainConfig().to_dict()
    assert {name: settings[name] for name in PROTOTYPE} == PROTOTYPE


@pytest.mark.parametrize(
    ("model_path", "given", "expected"),
    [
        ("/models/sa2va", None, 5e-5),
        ("/models/sa2va", 1e-3, 1e-3),
        ("/models/sa2va", 0.0, 0.0),  # 0 was asked for and is not replaced
        (None, 1e-3, 1e-3),
        (RANDOM_MODEL, 1e-3, 1e-3),
    ],
)
def test_learning_rate_that_is_used(model_path: str | None, given: float | None, expected: float) -> None:
    assert TrainConfig(model_path=model_path, learning_rate=given).peak_learning_rate == expected


def test_the_miniature_learns_faster_than_a_real_model() -> None:
    real = TrainConfig(model_path="/models/sa2va").peak_learning_rate
    assert (
        TrainConfig().peak_learning_rate
        == TrainConfig(model_path=RANDOM_MODEL).peak_learning_rate
        > 10 * real
    )


# ---- Refusals


TOO_SMALL = {
    "num_epochs": 0, "batch_size": 0, "num_passes": 0, "log_freq": 0, "val_freq": 0, "save_freq": 0,
    "num_workers": 0, "num_samples": 1, "num_regions": -1, "min_component_px": -1,
    "sanity_overfit": -1, "gpu": -1,
    "max_train_samples": 0, "max_val_samples": 0, "lora_rank": 0, "lora_alpha": 0,
}  # fmt: skip
NOT_POSITIVE = ("clip", "temperature", "max_grad_norm")
NEGATIVE = ("kl_coef", "entropy_coef", "correlation_px", "structure_weight", "weight_decay", "learning_rate")
NAN = float("nan")


@pytest.mark.parametrize("name", TOO_SMALL)
def test_a_number_that_is_too_small_is_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^--{name} is {TOO_SMALL[name]}; give at least {TOO_SMALL[name] + 1}\\.$"
    ):
        TrainConfig(**{name: TOO_SMALL[name]})
    assert getattr(TrainConfig(**{name: TOO_SMALL[name] + 1}), name) == TOO_SMALL[name] + 1


@pytest.mark.parametrize("name", NOT_POSITIVE)
@pytest.mark.parametrize("value", [0, -0.5, NAN])
def test_a_number_that_must_be_positive_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name} is {value}; give a value above 0"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", NEGATIVE)
@pytest.mark.parametrize("value", [-1e-9, NAN])
def test_a_negative_number_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{name} is {value}; give 0 or more"):
        TrainConfig(**{name: value})
    assert getattr(TrainConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", ["warmup_share", "close_gaps"])
@pytest.mark.parametrize("share", [-0.1, 1, NAN])
def test_a_share_and_a_probability_are_below_1(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=f"--{name} is {share}"):
        TrainConfig(**{name: share})
    assert getattr(TrainConfig(**{name: 0}), name) == 0


def test_a_floor_for_dice_is_a_dice_and_belongs_to_the_constrained_objective() -> None:
    for floor in (-0.1, 1.5, NAN):
        with pytest.raises(ValueError, match=f"--dice_floor is {floor}"):
            TrainConfig(objective="constrained", dice_floor=floor)
    with pytest.raises(ValueError, match="--dice_floor is for --objective constrained"):
        TrainConfig(dice_floor=0.8)
    assert TrainConfig(objective="constrained", dice_floor=1).dice_floor == 1


def test_two_stages_need_two_epochs() -> None:
    with pytest.raises(ValueError, match=r"--stage sft\+rl needs --num_epochs of at least 2"):
        TrainConfig(stage="sft+rl", num_epochs=1)


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 7


# ---- Stages


@pytest.mark.parametrize(
    ("stage", "num_epochs", "expected"),
    [
        ("rl", 3, "rl rl rl"),
        ("sft", 2, "sft sft"),
        ("sft+rl", 2, "sft rl"),
        ("sft+rl", 3, "sft sft rl"),
        ("sft+rl", 6, "sft sft sft sft sft rl"),
        ("sft+rl", 13, "sft " * 11 + "rl rl"),
    ],
)
def test_stage_of_each_epoch(stage: str, num_epochs: int, expected: str) -> None:
    config = TrainConfig(stage=stage, num_epochs=num_epochs)
    stages = [config.stage_of_epoch(epoch, num_epochs) for epoch in range(1, num_epochs + 1)]
    assert " ".join(stages) == expected


@pytest.mark.parametrize(
    ("rl_epochs", "num_epochs", "expected"),
    [
        (1, 5, "sft sft sft sft rl"),
        (3, 5, "sft sft rl rl rl"),
        (1, 10, "sft " * 8 + "rl rl"),
        (1, 2, "sft rl"),
    ],
)
def test_ppo_gets_as_many_epochs_as_asked(rl_epochs: int, num_epochs: int, expected: str) -> None:
    """A sanity run has more epochs than the settings say, and the same share of them."""
    config = TrainConfig(stage="sft+rl", num_epochs=5, rl_epochs=rl_epochs)
    stages = [config.stage_of_epoch(epoch, num_epochs) for epoch in range(1, num_epochs + 1)]
    assert " ".join(stages) == expected


def test_epochs_of_ppo_that_cannot_be_are_refused() -> None:
    for rl_epochs in (0, 3, 4):
        with pytest.raises(ValueError, match=f"--rl_epochs is {rl_epochs} of --num_epochs 3"):
            TrainConfig(stage="sft+rl", rl_epochs=rl_epochs)
    with pytest.raises(ValueError, match=r"--rl_epochs is for --stage sft\+rl; with --stage rl"):
        TrainConfig(rl_epochs=1)


# ---- Presets


def test_presets_are_what_the_commands_promise() -> None:
    quick, full = PRESETS["quick"], PRESETS["full"]
    assert (quick.max_train_samples, quick.max_val_samples, quick.num_epochs) == (50, 20, 1)
    assert (full.max_train_samples, full.max_val_samples, full.num_epochs) == (1000, 100, 3)
    assert quick.model_path is full.model_path is quick.data_root is full.data_root is None
    assert PRESETS["debug"].model_path == RANDOM_MODEL


def test_a_preset_is_changed_by_a_copy() -> None:
    assert get_preset("quick", seed=7) == dataclasses.replace(PRESETS["quick"], seed=7)
    assert PRESETS["quick"].seed == 42
    with pytest.raises(ValueError, match="--num_epochs is 0"):
        get_preset("quick", num_epochs=0)


def test_an_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"Unknown preset 'fast'\. Choose one of quick, full, debug"):
        get_preset("fast")


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name: str) -> None:
    values = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert TrainConfig(**values | {"lora_scope": tuple(values["lora_scope"])}) == PRESETS[name]


def test_ppo_after_a_supervised_stage_has_a_fortieth_of_the_rate_or_its_own() -> None:
    both = TrainConfig(stage="sft+rl", learning_rate=1e-2)
    assert (both.rate_of_stage("sft"), both.rate_of_stage("rl")) == pytest.approx((1e-2, 2.5e-4))
    assert TrainConfig(stage="sft+rl", rl_learning_rate=3e-4).rate_of_stage("rl") == 3e-4
    assert TrainConfig(stage="rl", learning_rate=1e-2).rate_of_stage("rl") == 1e-2
    with pytest.raises(ValueError, match=r"^--rl_learning_rate is for --stage sft\+rl"):
        TrainConfig(stage="rl", rl_learning_rate=1e-3)
    with pytest.raises(ValueError, match="--rl_learning_rate is nan; give 0 or more"):
        TrainConfig(stage="sft+rl", rl_learning_rate=NAN)


def test_a_supervised_epoch_sweeps_as_often_as_ppo_passes() -> None:
    config = TrainConfig(stage="sft+rl", num_epochs=3, num_passes=4)
    assert [config.num_sweeps(epoch, 3) for epoch in (1, 2, 3)] == [4, 4, 1]
    assert TrainConfig(control="unet", num_passes=4).num_sweeps(1, 1) == 4
