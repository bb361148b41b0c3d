"""All settings of a training in six frozen groups, and the named presets.

Field names are the command line's options, without their groups; the comment over each is its help text.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from vesselrl.experiment.ranges import check_settings

DEFAULT_LEARNING_RATE = 5e-5
# The miniature is a thousand times smaller than a real Sa2VA and needs larger steps; see docs/results.md.
EMBEDDED_LEARNING_RATE, EMBEDDED_RL_LEARNING_RATE = 2e-3, 3e-4  # the second: PPO from the base model
# The U-Net control is trained from random weights; tests/training/test_baselines.py.
UNET_LEARNING_RATE = 4e-3
# Share of it that PPO gets after a supervised stage; at a tenth the masks first lose what they then win back.
RL_RATE_SHARE = 0.025
# In place of a model folder: a tiny Sa2VA with random weights, made on the spot.
RANDOM_MODEL = "random"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where images and masks lie in a data root, and what tells a mask's name from its image's."""

    # Folder of the images below data_root; none: the run's own, or images, Original, imagesTr and the like.
    image_dir: str | None = None
    # Folder of the masks below data_root; none: the run's own, or masks, 1st_manual, labelsTr and the like.
    mask_dir: str | None = None
    # What follows the image's name in that of its mask, such as _seg; none: the run's own, or _mask, _gt …
    mask_suffix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reading(Places):
    """How a data root is read: where the files lie, and who the patients are."""

    # Regular expression with groups patient, sequence, frame; none: the run's own, or the known file names.
    patient_pattern: str | None = None
    # CSV file with columns file_name,patient: several spellings of one person; none: the run's own, or none.
    patient_aliases: str | None = None


READING = tuple(Reading.__dataclass_fields__)  # arguments of `find_samples` and options of the commands


@dataclass(frozen=True)
class DataSettings(Reading):
    """Images of a training, their split, and how they are shown."""

    # Folder with images/ and annotations.json or masks/; none: the built-in synthetic angiograms.
    data_root: str | None = None
    # Decides which patients are in which subset and which images are chosen; --seed decides everything else.
    split_seed: int = 42
    # A data_split.json to use as it is, such as a published split; images that it does not list are left out.
    split_file: str | None = None
    # Fold i of k of a cross-validation, such as 1/5: every patient is tested in exactly one of the k runs.
    fold: str | None = None
    # frame ignores patients: scores are then flattered, and every output is marked LEAKY.
    split_unit: Literal["patient", "frame"] = "patient"
    # What to do with look-alike images of different patients in two subsets of the split: stop, or allow.
    near_duplicates: Literal["stop", "allow"] = "stop"
    # Images that the base model was trained on: none, all, or a text file of file names. Its scores there
    # are no fair baseline, and the report says so.
    base_trained_on: str = "none"
    # Largest number of training images; none: all. The choice goes round the patients.
    max_train_samples: int | None = None
    # Largest number of validation images; none: all. The choice goes round the patients.
    max_val_samples: int | None = None
    # Random changes of the training images and their masks; see vesselrl/data/augment.py.
    augment: Literal["none", "flips", "light", "strong"] = "none"
    # Side in px of the random crops that training shows of a larger image, and of the overlapping tiles that
    # it is predicted in, at its own resolution; 0: none; left out: the model's square, for images more than
    # twice as large.
    tile_px: int | None = None
    # Easy images first, all of them from the middle of the epochs on.
    curriculum: bool = False


@dataclass(frozen=True)
class ModelSettings:
    """The model and its adapters."""

    # Sa2VA checkpoint folder, or ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub; none: the miniature
    # shipped with the package; random: a tiny one for tests.
    model_path: str | None = None
    # The question put to the model; <image> is added.
    prompt: str = "Please segment the blood vessel."
    # Run or adapter folder to start from; its data split is used again.
    init_lora: str | None = None
    # small: r16 a32 on q,v; medium: r32 a64 on q,k,v,o;
    # large: r64 a128 on those and gate,up,down (language model).
    lora_preset: Literal["small", "medium", "large"] = "medium"
    # Rank of the adapters; none: the preset's own.
    lora_rank: int | None = None
    # Adapters are scaled by alpha / rank; none: the preset's own.
    lora_alpha: int | None = None
    # Dropout on the adapters' inputs in supervised steps; none: the preset's own.
    lora_dropout: float | None = None
    # Parts that get adapters: language_model, projector, mask_decoder, image_encoder.
    lora_scope: tuple[str, ...] = ("projector", "mask_decoder", "image_encoder")
    # A small U-Net that refines masks at the image's own size, trained with the adapters: none, pre-trained
    # on synthetic images of many kinds, or random. Where the start has one already, that is trained.
    detail_head: Literal["none", "pretrained", "random"] = "none"
    # Vision tower, language model and kept features in bfloat16; SAM2 stays in float32, but its image encoder
    # computes in bfloat16 on a GPU.
    use_bf16: bool = False
    # A language model in the scope in 4 bits; needs a GPU and the extra nf4.
    use_nf4: bool = False


@dataclass(frozen=True)
class OptimSettings:
    """Stages, schedule and optimizer."""

    # sft: supervised (BCE + Dice). rl: PPO. sft+rl: supervised, and PPO for the last epochs.
    stage: Literal["sft", "rl", "sft+rl"] = "rl"
    # Loss of the supervised steps: BCE + soft Dice; half of it and half of soft clDice; it on the worst logit
    # of a pixel's class in the 3 x 3 around (SCNP); or it plus skeleton recall.
    sft_loss: Literal["bce_dice", "bce_dice_cldice", "bce_dice_scnp", "bce_dice_skeleton_recall"] = "bce_dice"
    # Weight of the loss of the mask decoder's own masks beside a detail head, in supervised steps; above 0
    # the head is given none for every other image. 0: without the head they may be empty.
    deep_supervision: float = 0.0
    # Train a control instead of the model, on the same images: a U-Net from scratch or from the detail head's
    # first weights, or the settings of a Frangi filter. It is supervised whatever the stage; adapters and PPO
    # are not used.
    control: Literal["unet", "unet_pretrained", "frangi"] | None = None
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
    # Of adapters, order and sampled masks; the split has --split_seed.
    seed: int = 42


@dataclass(frozen=True)
class PPOSettings:
    """Policy optimisation."""

    # Masks sampled per image.
    num_samples: int = 4
    # How often an epoch looks at each image: PPO makes so many passes over the masks sampled for it, a
    # supervised epoch so many passes over the data, each in another order.
    num_passes: int = 2
    # PPO keeps the ratio of a pixel's action probability, new to old, within 1 - clip to 1 + clip.
    clip: float = 0.2
    # Largest KL divergence of an update, per undecided pixel: a step beyond it is shortened, and is the last.
    target_kl: float = 0.1
    # Weight of the KL divergence from the starting policy.
    kl_coef: float = 0.01
    # Weight of the entropy, which rewards undecided pixels.
    entropy_coef: float = 0.0
    # Divides the logits when masks are sampled; larger explores more.
    temperature: float = 1.0
    # Smoothness of the random field that masks are sampled with, in px; 0: independent pixels.
    correlation_px: float = 2.0
    # Regions per image that are flipped and rescored for topology, length and your own reward.
    num_regions: int = 96
    # Factor on their difference reward; 1: overlap and structure count as the reward's weights say.
    structure_weight: float = 2.0
    # expected: all-action policy gradient, both actions of a pixel count by their probability;
    # sampled: the sampled one alone.
    pixel_action: Literal["expected", "sampled"] = "expected"
    # success: inverse-probability weighting, the difference reward over the probability of the better action,
    # so that confident mistakes are learned from. plain: the policy gradient, which vanishes there.
    advantage: Literal["success", "plain"] = "success"
    # weighted: the reward as it is. constrained: its structure terms, with Dice, recall and precision kept
    # above dice_floor, recall_target and precision_target on validation patients, by Lagrange multipliers.
    objective: Literal["weighted", "constrained"] = "weighted"
    # Lower bound on the validation Dice in the constrained objective.
    dice_floor: float = 0.0


@dataclass(frozen=True)
class RewardSettings:
    """The reward, and the post-processing of masks before they are scored."""

    # multi_objective: all terms below; simple_dice: Dice alone; recall_focused: 0.3 Dice, 0.7 recall.
    reward_type: Literal["multi_objective", "simple_dice", "recall_focused"] = "multi_objective"
    # default: bounded, with a precision guard. seed: the prototype's formula.
    reward_spec: Literal["default", "seed"] = "default"
    # Weight of Dice.
    dice_weight: float = 0.5
    # Weight of recall.
    recall_weight: float = 0.2
    # Weight of clDice and of connected components, junctions and ends.
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


@dataclass(frozen=True)
class RunSettings:
    """Where a training runs, how often it reports, and where results go."""

    # Folder that gets the run folder.
    output_dir: str = "output"
    # Language of the report: English or Chinese.
    lang: Literal["en", "zh"] = "en"
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
    # Limit in GB of OUTPUT_DIR/cache, where the features of a frozen image encoder are kept, and likewise the
    # states of a frozen language model; 0: memory only.
    cache_gb: float = 20.0
    # Trackers that get the metrics too, beside TensorBoard, which always does; each needs the package of its
    # name.
    report_to: tuple[Literal["tensorboard", "wandb", "swanlab", "mlflow", "trackio"], ...] = ()
    # The same as --report_to wandb.
    use_wandb: bool = False
    # Train and validate on this many images to see whether the model can learn at all; 0: off.
    sanity_overfit: int = 0

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers beside TensorBoard, each once."""
        named = (name for name in self.report_to if name != "tensorboard")
        return tuple(dict.fromkeys((*named, *["wandb"] * self.use_wandb)))


_FLAT = tyro.conf.arg(name="")  # no prefix on the command line


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `vesselrl train`; a value out of range is a ValueError that names the option."""

    data: Annotated[DataSettings, _FLAT] = DataSettings()
    model: Annotated[ModelSettings, _FLAT] = ModelSettings()
    optim: Annotated[OptimSettings, _FLAT] = OptimSettings()
    ppo: Annotated[PPOSettings, _FLAT] = PPOSettings()
    reward: Annotated[RewardSettings, _FLAT] = RewardSettings()
    run: Annotated[RunSettings, _FLAT] = RunSettings()

    def __post_init__(self) -> None:
        check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, without their groups, as plain values for JSON."""
        groups = asdict(self).values()
        return {k: list(v) if isinstance(v, tuple) else v for group in groups for k, v in group.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Settings read back from a run's config.json; what this version does not know is left out."""
        known = cls().to_dict()
        return cls().with_(**{name: value for name, value in values.items() if name in known})

    def with_(self, **changes: object) -> "TrainConfig":
        """A copy with some settings changed, by their names without groups; an unknown one is a TypeError."""
        changes = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
        groups = {}
        for name, old in vars(self).items():
            groups[name] = replace(old, **{k: changes.pop(k) for k in vars(old) if k in changes})
        if changes:
            raise TypeError(f"There are no settings called {', '.join(changes)}.")
        return replace(self, **groups)

    @property
    def lower_bounds(self) -> dict[str, float]:
        """Validation means that the constrained objective keeps; a bound of 0 is none."""
        recall, precision = self.reward.recall_target, self.reward.precision_target
        bounds = {"dice": self.ppo.dice_floor, "recall": recall, "precision": precision}
        return {name: bound for name, bound in bounds.items() if bound > 0}

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that is used."""
        if self.optim.learning_rate is not None:
            return self.optim.learning_rate
        if self.optim.control == "unet":
            return UNET_LEARNING_RATE
        return self._small_learning_rate if self._is_small else DEFAULT_LEARNING_RATE

    @property
    def detail_rate_factor(self) -> float:
        """Learning rate of a detail head over that of the adapters; the head is as small beside any model."""
        return 1.0 if self._is_small else self._small_learning_rate / DEFAULT_LEARNING_RATE

    @property
    def _is_small(self) -> bool:
        return self.model.model_path in (None, RANDOM_MODEL) or self.optim.control is not None

    @property
    def _small_learning_rate(self) -> float:
        is_rl = self.optim.stage == "rl" and self.optim.control is None
        return EMBEDDED_RL_LEARNING_RATE if is_rl else EMBEDDED_LEARNING_RATE

    def rate_of_stage(self, stage: str) -> float:
        """The peak learning rate of `sft` or `rl`."""
        if self.optim.stage != "sft+rl" or stage == "sft":
            return self.peak_learning_rate
        own = self.optim.rl_learning_rate
        return RL_RATE_SHARE * self.peak_learning_rate if own is None else own

    def stage_of_epoch(self, epoch: int, num_epochs: int) -> str:
        """`sft` or `rl` for one of `num_epochs` epochs, counted from 1; a sanity run has more than given."""
        optim = self.optim
        if optim.control is not None or optim.stage != "sft+rl":
            return "sft" if optim.control else optim.stage
        rl_epochs = optim.rl_epochs or max(1, optim.num_epochs // 6)
        # Of a sanity run the same share, at least one.
        rl_epochs = max(1, rl_epochs * num_epochs // optim.num_epochs)
        return "sft" if epoch <= num_epochs - rl_epochs else "rl"

    def passes_of_epoch(self, epoch: int, num_epochs: int) -> int:
        """Passes over the data in an epoch, counted from 1 of `num_epochs`."""
        return self.ppo.num_passes if self.stage_of_epoch(epoch, num_epochs) == "sft" else 1


PRESETS: dict[str, TrainConfig] = {
    # Minutes on two CPU cores with the embedded model. Inverse-probability weighting bloated the masks of one
    # seed in three. A precision guard at 0.85 ends below: easy images fall to it at no cost, hard ones stay.
    "quick": TrainConfig().with_(
        num_epochs=1, max_train_samples=50, max_val_samples=20, num_passes=4, val_freq=25, advantage="plain",
        precision_target=0.9, precision_weight=1.5,
    ),
    # The real thing: with a detail head, supervised, then PPO; with the embedded model under an hour on two
    # CPU cores. The official layout has no place for the head: --detail_head none leaves it out.
    "full": TrainConfig().with_(
        stage="sft+rl", detail_head="pretrained", num_epochs=3, max_train_samples=600, max_val_samples=100,
        batch_size=1, num_passes=2, val_freq=500, precision_target=0.9,
    ),
    # Seconds: a random miniature on a few small synthetic images, two updates; for tests and newcomers.
    "debug": TrainConfig().with_(
        model_path=RANDOM_MODEL, num_epochs=1, max_train_samples=4, max_val_samples=3, lora_rank=4,
        lora_alpha=8, num_samples=2, num_regions=1, val_freq=2, log_freq=1,
    ),
}  # fmt: skip
