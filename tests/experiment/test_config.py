"""Settings: flat names for groups, defaults of the prototype, refusals that name the option, stages."""

import dataclasses
import json
import re
from collections import Counter

import pytest

from vesselrl import cli
from vesselrl.experiment.config import PRESETS, RANDOM_MODEL, TrainConfig, get_preset

# As the prototype's documentation lists them.
PROTOTYPE = {
    "lora_preset": "medium", "num_epochs": 3, "weight_decay": 0.01, "reward_type": "multi_objective",
    "dice_weight": 0.5, "recall_weight": 0.2, "topology_weight": 0.2, "length_weight": 0.1,
    "recall_target": 0.85,
    "prompt": "Please segment the blood vessel.", "log_freq": 10, "val_freq": 100, "save_freq": 1, "gpu": 0,
}  # fmt: skip


def config(**settings: object) -> TrainConfig:
    return TrainConfig().with_(**settings)


def test_defaults_are_those_of_the_prototype() -> None:
    settings = TrainConfig().to_dict()
    assert {name: settings[name] for name in PROTOTYPE} == PROTOTYPE


# ---- Groups behind flat names


def test_no_two_groups_have_a_setting_of_one_name() -> None:
    names = Counter(name for group in dataclasses.asdict(TrainConfig()).values() for name in group)
    assert set(names.values()) == {1}
    assert names.keys() == TrainConfig().to_dict().keys()


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_line_offers_every_setting_flat(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One option each, --use_x with --no_use_x, and the defaults of the preset; no group in any name."""
    monkeypatch.setenv("COLUMNS", "400")  # no option begins a line because of a wrapped sentence
    assert cli.main(["train", "--preset", name, "--help"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", capsys.readouterr().out)
    offered = re.findall(r"^\s+--(\w+)(?:, --no_(\w+))?", text, re.MULTILINE)
    settings = PRESETS[name].to_dict()
    assert [option for option, _ in offered] == list(settings)
    assert {option for option, negated in offered if negated == option} == {
        option for option, value in settings.items() if isinstance(value, bool)
    }
    defaults = re.findall(r"\(default:(.*?)\)\s*$", text, re.MULTILINE | re.DOTALL)
    shown = [" ".join(default.split()).strip("'") for default in defaults]
    plain = [" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in settings.values()]
    assert shown == plain


def test_options_reach_their_groups_in_both_spellings() -> None:
    words = "--num_epochs 5 --lora-rank 8 --no-use_bf16 --use_wandb --close_gaps .3 --lora_scope projector"
    expected = config(num_epochs=5, lora_rank=8, use_wandb=True, close_gaps=0.3, lora_scope=["projector"])
    assert cli.parse(TrainConfig, words.split(), "train") == expected
    assert expected.optim.num_epochs == 5
    assert expected.model.lora_scope == ("projector",)


def test_settings_are_changed_by_a_copy_and_unknown_ones_are_refused() -> None:
    assert get_preset("quick", seed=7) == PRESETS["quick"].with_(seed=7) != PRESETS["quick"]
    assert PRESETS["quick"].optim.seed == 42
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().optim.seed = 7
    with pytest.raises(TypeError, match="no settings called sede"):
        config(sede=7)
    with pytest.raises(ValueError, match=r"Unknown preset 'fast'\. Choose one of quick, full, debug"):
        get_preset("fast")


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name: str) -> None:
    values = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert TrainConfig.from_dict(values | {"of_another_version": 1}) == PRESETS[name]


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
    value = TOO_SMALL[name]
    with pytest.raises(ValueError, match=f"^--{name} is {value}; give at least {value + 1}\\.$"):
        config(**{name: value})
    assert config(**{name: value + 1}).to_dict()[name] == value + 1


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        *((name, value, "give a value above 0") for name in NOT_POSITIVE for value in (0, -0.5, NAN)),
        *((name, value, "give 0 or more") for name in NEGATIVE for value in (-1e-9, NAN)),
        *((name, value, "give") for name in ("warmup_share", "close_gaps") for value in (-0.1, 1, NAN)),
        ("fold", "'6/5'", "give a share such as 1/5"),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: object, advice: str) -> None:
    given = value.strip("'") if isinstance(value, str) else value
    with pytest.raises(ValueError, match=f"^--{name} is {value}; {advice}"):
        config(**{name: given})
    if name not in (*NOT_POSITIVE, "fold"):
        assert config(**{name: 0}).to_dict()[name] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"objective": "constrained", "dice_floor": v}, f"--dice_floor is {v}") for v in (-0.1, 1.5, NAN)),
        ({"dice_floor": 0.8}, "--dice_floor is for --objective constrained"),
        ({"stage": "sft+rl", "num_epochs": 1}, r"--stage sft\+rl needs --num_epochs of at least 2"),
        *(({"stage": "sft+rl", "rl_epochs": k}, f"--rl_epochs is {k} of --num_epochs 3") for k in (0, 3, 4)),
        ({"rl_epochs": 1}, r"--rl_epochs is for --stage sft\+rl; with --stage rl"),
        ({"rl_learning_rate": 1e-3}, r"^--rl_learning_rate is for --stage sft\+rl"),
        ({"stage": "sft+rl", "rl_learning_rate": NAN}, "--rl_learning_rate is nan; give 0 or more"),
        ({"curriculum": True, "num_epochs": 1}, "--curriculum needs --num_epochs of at least 2"),
        ({"split_file": "a.json", "fold": "1/3"}, "--split_file says who is in which subset"),
        ({"control": "unet", "init_lora": "run"}, "no adapters to start from"),
        ({"control": "frangi", "stage": "sft+rl"}, "no second stage"),
        ({"control": "frangi", "sft_loss": "bce_dice_cldice"}, "there are none"),
        ({"sft_loss": "bce_dice_cldice"}, "there are none"),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_bound_of_0_is_none() -> None:
    constrained = config(objective="constrained", dice_floor=1, precision_target=0.0)
    assert constrained.lower_bounds == {"dice": 1, "recall": 0.85}


# ---- Stages and rates


@pytest.mark.parametrize(
    ("settings", "num_epochs", "expected"),
    [
        ({"stage": "rl"}, 3, "rl rl rl"),
        ({"stage": "sft"}, 2, "sft sft"),
        ({"control": "unet", "sft_loss": "bce_dice_cldice"}, 2, "sft sft"),
        ({"stage": "sft+rl", "num_epochs": 2}, 2, "sft rl"),
        ({"stage": "sft+rl", "num_epochs": 6}, 6, "sft sft sft sft sft rl"),
        ({"stage": "sft+rl", "num_epochs": 13}, 13, "sft " * 11 + "rl rl"),
        ({"stage": "sft+rl", "num_epochs": 5, "rl_epochs": 3}, 5, "sft sft rl rl rl"),
        # A sanity run has more epochs than the settings say, and the same share of them.
        ({"stage": "sft+rl", "num_epochs": 5, "rl_epochs": 1}, 10, "sft " * 8 + "rl rl"),
        ({"stage": "sft+rl", "num_epochs": 5, "rl_epochs": 1}, 2, "sft rl"),
    ],
)
def test_stage_of_each_epoch(settings: dict, num_epochs: int, expected: str) -> None:
    stages = [config(**settings).stage_of_epoch(epoch, num_epochs) for epoch in range(1, num_epochs + 1)]
    assert " ".join(stages) == expected


def test_a_supervised_epoch_passes_over_the_data_as_often_as_ppo_over_its_masks() -> None:
    two_stages = config(stage="sft+rl", num_epochs=3, num_passes=4)
    assert [two_stages.passes_of_epoch(epoch, 3) for epoch in (1, 2, 3)] == [4, 4, 1]
    assert config(control="unet", num_passes=4).passes_of_epoch(1, 1) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_path": "/models/sa2va"}, 5e-5),
        ({"model_path": "/models/sa2va", "learning_rate": 0.0}, 0.0),  # 0 was asked for and is not replaced
        ({"learning_rate": 1e-3}, 1e-3),
        ({"control": "unet"}, 4e-3),
        ({"control": "unet", "learning_rate": 1e-4}, 1e-4),
    ],
)
def test_learning_rate_that_is_used(settings: dict, expected: float) -> None:
    assert config(**settings).peak_learning_rate == expected
    assert TrainConfig().peak_learning_rate == config(model_path=RANDOM_MODEL).peak_learning_rate > 5e-4


def test_ppo_after_a_supervised_stage_has_a_fortieth_of_the_rate_or_its_own() -> None:
    both = config(stage="sft+rl", learning_rate=1e-2)
    assert (both.rate_of_stage("sft"), both.rate_of_stage("rl")) == pytest.approx((1e-2, 2.5e-4))
    assert config(stage="sft+rl", rl_learning_rate=3e-4).rate_of_stage("rl") == 3e-4
    assert config(stage="rl", learning_rate=1e-2).rate_of_stage("rl") == 1e-2
