"""The options of every verb but `train`, by field; a comment over each says what it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from vesselrl.experiment.config import ModelSettings, Places, Reading, TrainConfig

# Options that hold a path to data, which may name a patient: outputs show DATA_ROOT in its place.
DATA_PATHS = "data_root patient_aliases base_trained_on split_file second_masks image_dir mask_dir".split()

BaseModel = Annotated[str | None, tyro.conf.arg(aliases=["--model_path"])]


@dataclass(frozen=True)
class Start:
    """Where the settings of a training begin."""

    # A set of defaults that the other options change.
    preset: Literal["quick", "full", "debug"] | None = None
    # Run folder, or the config.json in one, whose settings take the place of the defaults.
    config: str | None = None


@dataclass(frozen=True)
class Resume:
    """Go on with an interrupted training after its last validation, with its own settings."""

    # Folder of the interrupted run.
    resume_from: str
    # What may have changed since the run began, and is taken as it is now.
    allow_change: tuple[Literal["settings", "reward", "model", "split", "images", "masks"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The base model, and how masks are made of its probabilities."""

    # Checkpoint folder; none: that of the adapter's run, or the embedded miniature.
    base_model: BaseModel = None
    # Probability above which a pixel is vessel.
    threshold: float = 0.5
    # Smallest component in px that masks keep; none: that of the adapter's run, or 0 = all.
    min_component_px: int | None = None
    # Probability above which gaps between components are closed; none: that of the run, or 0 = none.
    close_gaps: float | None = None
    # The question put to the model; none: that of the adapter's run, or the usual one.
    prompt: str | None = None
    # Vision tower and language model in bfloat16, for GPUs.
    use_bf16: bool = False
    # Side in px of the tiles of larger images; 0: none; left out: as the run was trained, or, without a run,
    # the model's square for images more than twice as large.
    tile_px: int | None = None
    # Mean of the probabilities over the image and its three mirror images, in four times the time.
    flips: bool = False
    # Side of a pixel in mm: lengths and widths of the vessels are then listed in mm, too.
    pixel_mm: float | None = None


@dataclass(frozen=True)
class Evaluate(Reading, Masks):
    """Score models on held-out patients; JSON and CSV per model."""

    # Adapter or run folders or ORG/NAME of a hub, each is scored, and none for the base model; left out: the
    # run in output/ that finished last, or the base model where there is no run or --base_model is given.
    lora_weights: tuple[str, ...] = ()
    # Data folder; none: the run's own data.
    data_root: str | None = None
    # Side of the patient split.
    split: Literal["test", "val", "train", "all"] = "test"
    # data_split.json of a run, whose sides are used; none: the run's own, or a new split by patient.
    split_file: str | None = None
    # Folder for the results; none: `evaluation` in the run folder.
    output_dir: str | None = None
    # Images that the base model was trained on: none, all or a text file; its scores there are marked.
    base_trained_on: str | None = None
    # On the test side, also score at the threshold that is best on the validation patients.
    tune: bool = True
    # Also score there with threshold, smallest component and closing of gaps that together have the highest
    # reward on the validation patients.
    tune_post: bool = False
    # Language of the report; none: the run's own, or English.
    lang: Literal["en", "zh"] | None = None
    # Folder with a second observer's masks of the same images: the row "human agreement".
    second_masks: str | None = None


@dataclass(frozen=True)
class Predict(Masks):
    """Segment an image or a folder: mask, probability map and overlay as PNG."""

    # Image file or folder of images.
    image: str
    # Adapter or run folder, ORG/NAME of a hub, or none for the base model; left out: the run in output/ that
    # finished last, or the base model where there is no run or --base_model is given.
    lora_weights: str | None = None
    # Folder for the results.
    output_dir: str = "output/predictions"
    # Part i of n of the images, i/n with i from 0 to n - 1: one process for each may run at the same time.
    shard: str = "0/1"
    # Masks as LabelMe or COCO files too, each in a folder with the images, to be corrected; PNG files and
    # predictions.csv are always written.
    format: tuple[Literal["png", "labelme", "coco", "csv"], ...] = ("png", "csv")


@dataclass(frozen=True)
class Demo(Masks):
    """Try a model on a page in the browser, of this machine alone; threshold and post-processing are live."""

    # Adapter or run folder, or none for the base model; left out: as in predict.
    lora_weights: str | None = None
    # Language of the page.
    lang: Literal["en", "zh"] = "en"
    # Of the page's address; none: the first free one from 7860.
    port: int | None = None


@dataclass(frozen=True)
class Merge:
    """Write a merged copy of the model in the official layout, and verify it."""

    # New folder for the merged model.
    output_model: str
    # Adapter or run folder; left out: the run in output/ that finished last.
    lora_weights: str | None = None
    # Checkpoint folder; none: that of the adapter's run, or the embedded miniature.
    base_model: BaseModel = None
    # Of the written weights; keep: each tensor's own.
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"


@dataclass(frozen=True)
class Compare:
    """Rank all runs on their test patients and say which one to deploy."""

    # Folder that is searched for runs.
    output_dir: str = "output"
    # Name of the run that the others are compared with; none: each run's own start.
    baseline: str | None = None
    # Metric to rank by; none: the reward, or Dice where rewards differ.
    rank_by: str | None = None


@dataclass(frozen=True)
class DataDraw:
    """Draw a synthetic data set in the layouts that training reads."""

    # New folder.
    root: str
    # target: thin low-contrast vessels, for training; source: the easier ones of the embedded miniature.
    domain: Literal["source", "target"] = "target"
    # Patients.
    num_patients: int = 12
    # Sequences of each patient.
    num_sequences: int = 2
    # Frames of each sequence.
    num_frames: int = 5
    # Side of the images in px.
    size: int = 256
    # Another seed draws other patients.
    seed: int = 0
    # annotations: annotations.json and masks/; nested: another form of annotations.json; masks: masks/ alone.
    layout: Literal["annotations", "nested", "masks"] = "annotations"


@dataclass(frozen=True)
class DataCheck(Reading):
    """Look at every record, image and mask of a data set; exit code 2 if something must be repaired."""

    # Data folder.
    data_root: tyro.conf.Positional[str]
    # Print the findings as JSON.
    json: bool = False
    # New folder for a repaired copy; the data set itself is never changed.
    fix: str | None = None


@dataclass(frozen=True)
class DataMerge(Reading):
    """Join new labels, such as corrected predictions, with a data set; new masks go before old ones."""

    # Data folder, which is never changed.
    old: tyro.conf.Positional[str]
    # Data folder with the new labels, or a folder of <image>_mask.png.
    new: tyro.conf.Positional[str]
    # New data folder.
    output: str
    # data_split.json of a run on the old data, whose patients keep their subset; none: that in OLD, if any.
    split_file: str | None = None


@dataclass(frozen=True)
class DataShow(Reading):
    """Write a contact sheet: images with the outline of their masks, as training sees them."""

    # Data folder; none: the built-in synthetic angiograms.
    data_root: tyro.conf.Positional[str | None] = None
    # The picture that is written.
    output: str = "output/contact_sheet.png"
    # Images on it.
    num_images: int = 12
    # Random changes of the images and their masks, as in training.
    augment: Literal["none", "flips", "light", "strong"] = "none"
    # Of the augmentation.
    seed: int = 42
    # Decides which patients are the training side.
    split_seed: int = 42


@dataclass(frozen=True)
class Doctor(Places):
    """Look at machine, packages, model folder and data before a long run."""

    # Checkpoint folder, or ORG/NAME of the Hugging Face hub; none: no model is looked at.
    base_model: BaseModel = None
    # Rebuild a missing config.json from the tensor shapes (Sa2VA-1B, InternVL3-2B, 8B, 14B).
    write_config: bool = False
    # Data folder; none: no data is looked at.
    data_root: str | None = None
    # Folder that runs would be written to.
    output_dir: str = "output"
    # Scope of the training whose memory is estimated.
    lora_scope: tuple[str, ...] = ModelSettings.lora_scope
    # Print the checks as JSON, with parameters and GB of each component of the model.
    json: bool = False


@dataclass(frozen=True)
class Push:
    """Upload the best adapter of a run and its model card to the Hugging Face hub; data stay here."""

    # ORG/NAME on the hub; it is made where there is none.
    repository: tyro.conf.Positional[str]
    # Adapter or run folder; left out: the run in output/ that finished last.
    lora_weights: str | None = None
    # Make a new repository that everyone can see; else only you and ORG can.
    public: bool = False


@dataclass(frozen=True)
class Completion:
    """Print the script by which a shell completes verbs, options and their values with the tab key."""

    # The shell.
    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]


# The options of every verb, for the reference in docs/ and the completion of shells.
OPTIONS: dict[str, tuple[type, ...]] = {
    "train": (TrainConfig, Resume, Start),
    "evaluate": (Evaluate,),
    "predict": (Predict,),
    "demo": (Demo,),
    "merge": (Merge,),
    "push": (Push,),
    "compare": (Compare,),
    "data check": (DataCheck,),
    "data show": (DataShow,),
    "data merge": (DataMerge,),
    "data draw": (DataDraw,),
    "doctor": (Doctor,),
    "completion": (Completion,),
}


def hide_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with an option's name, as DATA_ROOT, in place of each path to data."""
    hidden = {name: settings[name] for name in DATA_PATHS if settings.get(name) not in (None, "none", "all")}
    return {name: name.upper() if name in hidden else value for name, value in settings.items()}


def hide_paths_of_command(argv: Sequence[str]) -> list[str]:
    """A command line with DATA_ROOT, and the like, in place of each path to data.

    >>> hide_paths_of_command(["vesselrl", "train", "--data-root", "/angio/ZHANG", "--split_file=a.json"])
    ['vesselrl', 'train', '--data-root', 'DATA_ROOT', '--split_file=SPLIT_FILE']
    """
    shown, option = [], ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if option:
            argument, option = hide_paths({option: argument})[option], ""
        elif key in DATA_PATHS and equals:
            argument = f"{name}={hide_paths({key: value})[key]}"
        elif key in DATA_PATHS and key != name:
            option = key
        shown.append(argument)
    return shown
