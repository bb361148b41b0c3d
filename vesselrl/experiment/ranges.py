"""Which values the settings of a training may have, alone and together."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vesselrl.experiment.config import TrainConfig


def check_settings(config: "TrainConfig") -> None:
    """Raises a ValueError that names a setting out of range, or two that contradict each other."""
    values = config.to_dict()
    for names, is_valid, advice in _RANGES:
        for name in names.split():
            if values[name] is not None and not is_valid(values[name]):
                raise ValueError(f"--{name} is {values[name]!r}; {advice}.")
    for message, is_wrong in _contradictions(config).items():
        if is_wrong:
            raise ValueError(message)


def is_fold(text: str) -> bool:
    """Whether a text is a fold, i/k with 1 <= i <= k and k >= 2."""
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    return numbers is not None and int(numbers[1]) <= int(numbers[2]) >= 2


# Settings, the condition on a value that is given, and the advice; nan meets no condition.
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("num_epochs batch_size num_passes log_freq val_freq save_freq num_workers max_train_samples "
     "max_val_samples lora_rank lora_alpha", lambda v: v >= 1, "give at least 1"),
    ("num_samples", lambda v: v >= 2, "give at least 2"),
    ("num_regions min_component_px sanity_overfit gpu seed split_seed", lambda v: v >= 0, "give at least 0"),
    ("clip target_kl temperature max_grad_norm", lambda v: v > 0, "give a value above 0"),
    ("kl_coef entropy_coef correlation_px structure_weight weight_decay cache_gb learning_rate "
     "rl_learning_rate deep_supervision", lambda v: v >= 0, "give 0 or more"),
    ("close_gaps", lambda v: 0 <= v < 1, "give 0, or a probability below 1"),
    ("warmup_share", lambda v: 0 <= v < 1, "give a share from 0 to below 1"),
    ("tile_px", lambda v: v == 0 or v >= 32, "give 0 for none, or at least 32"),
    ("fold", is_fold, "give a share such as 1/5, up to 5/5"),
    ("lora_dropout", lambda v: 0 <= v <= 0.99, "give a share from 0 to 0.99"),
    ("lora_alpha", lambda v: v <= 10_000, "give at most 10000"),
    ("lora_rank", lambda v: v <= 2**16, "give at most 65536"),
    ("dice_floor", lambda v: 0 <= v <= 1, "give a Dice from 0 to 1"),
)  # fmt: skip


def _contradictions(c: "TrainConfig") -> dict[str, bool]:
    """Messages, and whether what they complain of is so."""
    optim, split_file, epochs = c.optim, c.data.split_file, c.optim.num_epochs
    own_split = bool(c.data.fold or c.model.init_lora or c.data.split_unit != "patient")
    two_stages, is_control, stage = optim.stage == "sft+rl", bool(optim.control), f"--stage {optim.stage}"
    supervised = optim.control in ("unet", "unet_pretrained") or (not is_control and optim.stage != "rl")
    return {
        "--split_file says who is in which subset. Leave out --fold, --split_unit and --init_lora.":
            split_file is not None and own_split,
        "--curriculum needs --num_epochs of at least 2: one epoch opens all images.":
            c.data.curriculum and epochs < 2,
        "--dice_floor is for --objective constrained; leave it out otherwise.":
            c.ppo.dice_floor > 0 and c.ppo.objective != "constrained",
        "--use_nf4 is for a language model in the scope; outside it is not kept in memory. Leave it out.":
            c.model.use_nf4 and "language_model" not in c.model.lora_scope,
        "--stage sft+rl needs --num_epochs of at least 2, one for each stage.": two_stages and epochs < 2,
        f"--rl_epochs is for --stage sft+rl; with {stage} leave it out.":
            optim.rl_epochs is not None and not two_stages,
        f"--rl_epochs is {optim.rl_epochs} of --num_epochs {epochs}; give at least 1, but not all.":
            optim.rl_epochs is not None and not 1 <= optim.rl_epochs < epochs,
        f"--rl_learning_rate is for --stage sft+rl; with {stage} use --learning_rate.":
            optim.rl_learning_rate is not None and not two_stages,
        f"--control {optim.control} has no adapters to start from; leave --init_lora out. The split is the "
        "same as that of other runs on this data with the same --split_seed.":
            is_control and c.model.init_lora is not None,
        f"--control {optim.control} has no second stage; leave --stage sft+rl out.":
            is_control and two_stages,
        f"--sft_loss {optim.sft_loss} is for supervised steps, and there are none; add --stage sft, --stage "
        "sft+rl or --control unet, or leave it out.": optim.sft_loss != "bce_dice" and not supervised,
        "--deep_supervision needs supervised steps and a detail head: add --stage sft or sft+rl, and "
        "--detail_head pretrained.": optim.deep_supervision > 0 and (
            not supervised or is_control or c.model.detail_head == "none"),
    }  # fmt: skip
