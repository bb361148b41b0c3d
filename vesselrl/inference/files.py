"""Predictions of image files, written as PNG: mask, probability map and overlay."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vesselrl.data.entries import IMAGE_SUFFIXES
from vesselrl.data.images import read_rgb
from vesselrl.data.patients import is_impersonal, names_a_person, pseudonyms
from vesselrl.data.privacy import MAPPING_FILE
from vesselrl.errors import DataError
from vesselrl.inference.predictor import Prediction, Predictor
from vesselrl.scoring.overlay import overlay

logger = logging.getLogger(__name__)


def find_images(path: Path) -> list[Path]:
    """The image file itself, or the images of a folder by name.

    Raises:
        DataError: nothing there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"--image {path} does not exist; give an image file or a folder of images.")
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise DataError(f"{path} holds no image; known endings are {', '.join(IMAGE_SUFFIXES)}.")
    return files


def predict_files(
    predictor: Predictor, path: Path, output_dir: Path, progress: Callable[[int, int], None] | None = None
) -> Iterator[dict]:
    """Segments files and writes mask, probability and overlay of each.

    They are `<stem>_mask.png` (0/255), `<stem>_probability.png` (16 bit) and `<stem>_overlay.png`. Where the
    file name has a person in it, a pseudonym stands for the stem, and `patients.mapping.json` in the output
    folder, for its owner only, says which file it is.

    Args:
        predictor: does the work.
        path: an image or a folder.
        output_dir: made when missing; files of the same name are replaced.
        progress: called with (images done, images in all).

    Yields:
        One dict per image: `image` (file name), `foreground` (share of pixels, 0 to 1), `mask` (path).

    Raises:
        DataError: a file that cannot be read, two files that would get the same result name, or an output
            folder that cannot be made.
    """
    files = find_images(path)
    stems = [file.stem for file in files]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise DataError(
            f"{len(twice)} file names differ only by their ending: "
            f"{shown_name(files, stems.index(twice[0]))} and the next; rename one of each."
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot write to {output_dir} ({error.strerror}); give another --output_dir."
        ) from None
    names = result_names(stems, output_dir)
    for done, file in enumerate(files, start=1):
        image = read_rgb(file, shown_name(files, done - 1))
        prediction = predictor.predict(image)
        yield write_prediction(image, prediction, output_dir, names[file.stem]) | {"image": file.name}
        if progress is not None:
            progress(done, len(files))


def result_names(stems: list[str], output_dir: Path) -> dict[str, str]:
    """What results are called: the picture's own name, or a pseudonym where that names a person."""
    people = [stem for stem in stems if names_a_person(stem)]
    keys = pseudonyms(people, mapping=output_dir / MAPPING_FILE) if people else {}
    return {stem: keys[stem].key if stem in keys else stem for stem in stems}


def shown_name(files: list[Path], index: int) -> str:
    """How messages call a file: by its name where that says nothing about a person, else by its place."""
    if is_impersonal(files[index].stem):
        return files[index].name
    return f"image {index + 1} of {len(files)} in name order"


def write_prediction(image: np.ndarray, prediction: Prediction, output_dir: Path, stem: str) -> dict:
    """Writes the three pictures of one image; returns `mask` (path) and `foreground` (share, 0 to 1)."""
    pictures = {
        "mask": prediction.mask.astype(np.uint8) * 255,
        "probability": np.round(prediction.probabilities * 65535).astype(np.uint16),
        "overlay": overlay(image, prediction.mask),
    }
    for kind, pixels in pictures.items():
        Image.fromarray(pixels).save(output_dir / f"{stem}_{kind}.png")
    return {"mask": str(output_dir / f"{stem}_mask.png"), "foreground": float(prediction.mask.mean())}
