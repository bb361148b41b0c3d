"""Every setting of a training, flat and frozen, and the named presets.

Field names are the command line's options; a comment over each says what it does and in which unit.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Literal

DEFAULT_LEARNING_RATE = 5e-5
# The miniature is a thousand times smaller than a real Sa2VA and needs larger steps; see docs/results.md.
EMBEDDED_LEARNING_RATE = 2e-3
# The U-Net control is trained from random weights; tests/training/test_target_difficulty.py.
UNET_LEARNING_RATE = 4e-3
# Share of it that PPO gets after a supervised stage: it refines what has been learned; at a tenth the masks
# first lose what they then win back.
RL_RATE_SHARE = 0.025
# In place of a model folder: a tiny Sa2VA with random weights, made on the spot.
RANDOM_MODEL = "random"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `vesselrl train`.

    Raises:
        ValueError: a value out of range; the message names the option.
    """

    # ---- What is trained, on what ----

    # Sa2VA checkpoint folder; none: the miniature shipped with the package; random: a tiny one for tests.
    model_path: str | None = None
    # Folder with images/ and annotations.json or masks/; none: the built-in synthetic angiograms.
    data_root: str | None = None
    # Folder that gets the run folder.
    output_dir: str = "output"
    # The question put to the model; <image> is added.
    prompt: str = "Please segment the blood vessel."
    # Regular expression with the groups patient, sequence, frame for other file names than the known ones.
    patient_pattern: str | None = None
    # CSV file with the columns file_name,patient: several spellings of one person.
    patient_aliases: str | None = None
    # Decides which patients are on which side and which images are chosen; --seed decides everything else.
    split_seed: int = 42
    # A data_split.json to use as it is, such as a published split; images that it does not list are left out.
    split_file: str | None = None
    # Share i of k of a cross-validation, such as 1/5: every patient is tested in exactly one of the k runs.
    fold: str | None = None
    # frame ignores patients: scores are then flattered, and every output is marked LEAKY.
    split_unit: Literal["patient", "frame"] = "patient"
    # What to do with look-alike images of different patients on two sides of the split: stop, or allow.
    near_duplicates: Literal["stop", "allow"] = "stop"
    # Images that the base model was trained on: none, all, or a text file of file names. Its scores there
    # are no fair baseline, and the report says so.
    base_trained_on: str = "none"
    # Run or adapter folder to start from; its data split is used again.
    init_lora: str | None = None
    # Largest number of training images; none: all. The choice goes round the patients.
    max_train_samples: int | None = None
    # Largest number of validation images; none: all. The choice goes round the patients.
    max_val_samples: int | None = None

    # Random changes of the training images and their masks; see vesselrl/data/augment.py.
    augment: Literal["none", "light", "strong"] = "none"
    # Easy images first, all of them from the middle of the epochs on.
    curriculum: bool = False

    # ---- Adapter ----

    # small: r16 a32 on q,v; medium: r32 a64 on q,k,v,o;
    # large: r64 a128 on those and gate,up,down (language model).
    lora_preset: Literal["small", "medium", "large"] = "medium"
    # Rank of the adapters; none: the preset's own.
    lora_rank: int | None = None
    # Adapters count alpha / rank times; none: the preset's own.
    lora_alpha: int | None = None
    # Share of an adapter's inputs that supervised steps leave out; none: the preset's own.
    lora_dropout: float | None = None
    # Parts that get adapters: language_model, projector, mask_decoder, image_encoder.
    lora_scope: tuple[str, ...] = ("projector", "mask_decoder", "image_encoder")

    # ---- Schedule ----

    # sft: supervised (BCE + Dice). rl: PPO. sft+rl: supervised, and PPO for the last epochs.
    stage: Literal["sft", "rl", "sft+rl"] = "rl"
    # Loss of the supervised steps: BCE + soft Dice, or half of that and half of soft clDice.
    sft_loss: Literal["bce_dice", "bce_dice_cldice"] = "bce_dice"
    # Train a control instead of the model, on the same images: a U-Net from scratch, or the settings of a
    # Frangi filter. It is supervised whatever the stage; adapters and PPO are not used.
    control: Literal["unet", "frangi"] | None = None
    # Epochs, of all stages together.
    num_epochs: int = 3
    # Epochs of PPO at the end of sft+rl; none: a sixth of all, at least one.
    rl_epochs: int | None = None
    # Images per step.
    batch_size: int = 2
    # Peak learning rate; none: 5e-5, or the embedded miniature's or the U-Net control's own.
    learning_rate: float | None = None
    # Peak learning rate of PPO after the supervised stage of sft+rl; none: a fortieth of the other.
    rl_learning_rate: float | None = None
    # Of AdamW.
    weight_decay: float = 0.01
    # Share of a stage's steps that warm up, then a half cosine down to 0.
    warmup_share: float = 0.05
    # Gradients of a larger norm are scaled down to it.
    max_grad_norm: float = 1.0
    # Of adapters, order and drawn masks; the split has --split_seed.
    seed: int = 42

    # ---- Reward ----

    # multi_objective: all terms below; simple_dice: Dice alone; recall_focused: 0.3 Dice, 0.7 recall.
    reward_type: Literal["multi_objective", "simple_dice", "recall_focused"] = "multi_objective"
    # default: bounded, with a precision guard. seed: the prototype's formula.
    reward_spec: Literal["default", "seed"] = "default"
    # Weight of Dice.
    dice_weight: float = 0.5
    # Weight of recall.
    recall_weight: float = 0.2
    # Weight of clDice and of pieces, junctions and ends.
    topology_weight: float = 0.2
    # Weight of the length of the centreline.
    length_weight: float = 0.1
    # Recall that the recall term asks for.
    recall_target: float = 0.85
    # Below this precision the reward falls by precision_weight * 10 per unit (spec default only).
    precision_target: float = 0.85
    # Of the precision guard.
    precision_weight: float = 0.75
    # Your own term, package.module:function with function(pred, gt) -> float on bool masks;
    # added to the reward.
    reward_fn: str | None = None
    # Weight of your own term.
    reward_fn_weight: float = 1.0

    # Smallest component in px that masks keep, in training, validation and test, and when this run predicts;
    # 0 keeps all.
    min_component_px: int = 0
    # Probability above which a gap between two components is closed, likewise; 0 closes none.
    close_gaps: float = 0.0

    # ---- PPO ----

    # Masks drawn per image.
    num_samples: int = 4
    # How often an epoch looks at each image: PPO passes so often over the masks drawn for it, a supervised
    # epoch goes so often through all images, each time in another order.
    num_passes: int = 2
    # PPO keeps the probability of a pixel's action within 1 - clip to 1 + clip of what it was.
    clip: float = 0.2
    # Weight of the divergence from the starting policy.
    kl_coef: float = 0.01
    # Weight of the entropy, which rewards undecided pixels.
    entropy_coef: float = 0.0
    # Divides the logits when masks are drawn; larger explores more.
    temperature: float = 1.0
    # Smoothness of the random field that masks are drawn with, in px; 0: independent pixels.
    correlation_px: float = 2.0
    # Regions per image that are flipped and rescored for topology, length and your own reward.
    num_regions: int = 96
    # Factor on their credit; 1: overlap and structure count as the reward's weights say.
    structure_weight: float = 2.0
    # expected: both actions of a pixel count, as often as they would be drawn; sampled: the drawn one.
    pixel_action: Literal["expected", "sampled"] = "expected"
    # success: credit divided by the probability of the better action, so that confident mistakes are learned
    # from. plain: the policy gradient, which dies out there.
    advantage: Literal["success", "plain"] = "success"
    # weighted: the reward as it is. constrained: its structure terms, with Dice, recall and precision kept
    # above dice_floor, recall_target and precision_target on validation patients, by prices set at val_freq.
    objective: Literal["weighted", "constrained"] = "weighted"
    # Dice on validation that the constrained objective keeps.
    dice_floor: float = 0.0

    # ---- Run ----

    # Steps between lines of the log.
    log_freq: int = 10
    # Steps between validations; there is one at every epoch's end too.
    val_freq: int = 100
    # Epochs between checkpoints.
    save_freq: int = 1
    # Index of the GPU; the CPU is used when there is none.
    gpu: int = 0
    # Threads that score masks.
    num_workers: int = 4
    # Limit in GB of OUTPUT_DIR/cache, where the features of a frozen image encoder are kept; 0: memory only.
    cache_gb: float = 20.0
    # Vision tower and language model in bfloat16; SAM2 stays in float32.
    use_bf16: bool = False
    # Also log to Weights & Biases.
    use_wandb: bool = False
    # Train and validate on this many images to see whether the model can learn at all; 0: off.
    sanity_overfit: int = 0

    def __post_init__(self) -> None:
        at_least_1 = (
            "num_epochs",
            "batch_size",
            "num_passes",
            "log_freq",
            "val_freq",
            "save_freq",
            "num_workers",
        )
        minimums = dict.fromkeys(at_least_1, 1) | {
            "num_samples": 2,
            "num_regions": 0,
            "min_component_px": 0,
            "sanity_overfit": 0,
            "gpu": 0,
            "seed": 0,
            "split_seed": 0,
        }
        for name in ("max_train_samples", "max_val_samples", "lora_rank", "lora_alpha"):
            if getattr(self, name) is not None:
                minimums[name] = 1
        for name, minimum in minimums.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} is {getattr(self, name)}; give at least {minimum}.")
        for name in ("clip", "temperature", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; give a value above 0.")
        for name in (
            "kl_coef",
            "entropy_coef",
            "correlation_px",
            "structure_weight",
            "weight_decay",
            "cache_gb",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; give 0 or more.")
        if not 0 <= self.close_gaps < 1:
            raise ValueError(f"--close_gaps is {self.close_gaps}; give 0, or a probability below 1.")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"--warmup_share is {self.warmup_share}; give a share from 0 to below 1.")
        if self.fold is not None and not (
            re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.fold)
            and self.fold_numbers[0] <= self.fold_numbers[1]
            and self.fold_numbers[1] >= 2
        ):
            raise ValueError(f"--fold is {self.fold!r}; give a share such as 1/5, up to 5/5.")
        asks_for_another = self.fold or self.init_lora or self.split_unit != "patient"
        if self.split_file is not None and asks_for_another:
            raise ValueError(
                "--split_file says who is on which side. Leave out --fold, --split_unit and --init_lora."
            )
        if self.curriculum and self.num_epochs < 2:
            raise ValueError("--curriculum needs --num_epochs of at least 2: one epoch opens all images.")
        self._check_floor()
        self._check_stages()
        self._check_control()

    def _check_floor(self) -> None:
        """Refuses a floor that is no Dice, or that nothing would keep."""
        if not 0 <= self.dice_floor <= 1:
            raise ValueError(f"--dice_floor is {self.dice_floor}; give a Dice from 0 to 1.")
        if self.dice_floor > 0 and self.objective != "constrained":
            raise ValueError("--dice_floor is for --objective constrained; leave it out otherwise.")

    def _check_stages(self) -> None:
        """Refuses a stage without an epoch, and rates that are none or not used."""
        if self.stage == "sft+rl" and self.num_epochs < 2:
            raise ValueError("--stage sft+rl needs --num_epochs of at least 2, one for each stage.")
        if self.rl_epochs is not None and self.stage != "sft+rl":
            raise ValueError(f"--rl_epochs is for --stage sft+rl; with --stage {self.stage} leave it out.")
        if self.rl_epochs is not None and not 1 <= self.rl_epochs < self.num_epochs:
            raise ValueError(
                f"--rl_epochs is {self.rl_epochs} of --num_epochs {self.num_epochs}; give at least 1, but "
                "not all."
            )
        for name in ("learning_rate", "rl_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; give 0 or more.")
        if self.rl_learning_rate is not None and self.stage != "sft+rl":
            raise ValueError(
                f"--rl_learning_rate is for --stage sft+rl; with --stage {self.stage} use --learning_rate."
            )

    def _check_control(self) -> None:
        """Refuses what contradicts a control, and a supervised loss where no step is supervised."""
        if self.control is not None and self.init_lora is not None:
            raise ValueError(
                f"--control {self.control} has no adapters to start from; leave --init_lora out. The split "
                "is the same as that of other runs on this data with the same --split_seed."
            )
        if self.control is not None and self.stage == "sft+rl":
            raise ValueError(f"--control {self.control} has no second stage; leave --stage sft+rl out.")
        is_stepped = self.control == "unet" or (self.control is None and self.stage != "rl")
        if self.sft_loss != "bce_dice" and not is_stepped:
            raise ValueError(
                f"--sft_loss {self.sft_loss} is for supervised steps, and there are none; add --stage sft, "
                "--stage sft+rl or --control unet, or leave it out."
            )

    @property
    def fold_numbers(self) -> tuple[int, int] | None:
        """(i, k) of `fold`."""
        if self.fold is None:
            return None
        number, _, count = self.fold.partition("/")
        return int(number), int(count)

    @property
    def floors(self) -> dict[str, float]:
        """The means that the constrained objective keeps; a floor of 0 is none."""
        floors = {"dice": self.dice_floor, "recall": self.recall_target, "precision": self.precision_target}
        return {name: floor for name, floor in floors.items() if floor > 0}

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that is used."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.control == "unet":
            return UNET_LEARNING_RATE
        is_miniature = self.model_path in (None, RANDOM_MODEL)
        return EMBEDDED_LEARNING_RATE if is_miniature else DEFAULT_LEARNING_RATE

    def stage_of_epoch(self, epoch: int, num_epochs: int) -> str:
        """`sft` or `rl` for one of `num_epochs` epochs, counted from 1; a sanity run has more than given."""
        if self.control is not None:
            return "sft"
        if self.stage != "sft+rl":
            return self.stage
        rl_epochs = self.rl_epochs or max(1, self.num_epochs // 6)
        # Of a sanity run the same share, at least one.
        rl_epochs = max(1, rl_epochs * num_epochs // self.num_epochs)
        return "sft" if epoch <= num_epochs - rl_epochs else "rl"

    def num_sweeps(self, epoch: int, num_epochs: int) -> int:
        """How often an epoch, counted from 1 of `num_epochs`, goes through its images."""
        return self.num_passes if self.stage_of_epoch(epoch, num_epochs) == "sft" else 1

    def rate_of_stage(self, stage: str) -> float:
        """The peak learning rate of `sft` or `rl`."""
        if self.stage != "sft+rl" or stage == "sft":
            return self.peak_learning_rate
        if self.rl_learning_rate is not None:
            return self.rl_learning_rate
        return RL_RATE_SHARE * self.peak_learning_rate

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Settings read back from a run's config.json; what this version does not know is left out."""
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{k: v for k, v in known.items() if k in cls.__dataclass_fields__})


PRESETS: dict[str, TrainConfig] = {
    # Minutes on two CPU cores with the embedded model: see whether everything works.
    # At the full rate from an untouched model, success-normalised credit bloated the masks with one seed in
    # three.
    "quick": TrainConfig(
        num_epochs=1, max_train_samples=50, max_val_samples=20, num_passes=4, val_freq=25, advantage="plain"
    ),
    # The real thing: supervised, then PPO; with the embedded model under an hour on two CPU cores.
    # A precision guard at 0.85 ends below 0.85: easy images fall to it at no cost, hard ones stay below.
    "full": TrainConfig(
        stage="sft+rl", num_epochs=3, max_train_samples=1000, max_val_samples=100, batch_size=1, num_passes=3,
        val_freq=500, precision_target=0.9,
    ),
    # Seconds: a random miniature on a few small drawn images, two updates; for tests and newcomers.
    "debug": TrainConfig(
        model_path=RANDOM_MODEL, num_epochs=1, max_train_samples=4, max_val_samples=3, lora_rank=4,
        lora_alpha=8, num_samples=2, num_regions=1, val_freq=2, log_freq=1,
    ),
}  # fmt: skip


def get_preset(name: str, **changes: object) -> TrainConfig:
    """A preset with some settings changed.

    Raises:
        ValueError: unknown name; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}. Choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
