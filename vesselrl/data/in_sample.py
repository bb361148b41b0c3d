"""Which images the base model has seen in its own training: there its score is no baseline."""

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vesselrl.data.annotations import Sample
from vesselrl.errors import DataError

logger = logging.getLogger(__name__)


def base_trained_on(choice: str | Path, samples: Sequence[Sample]) -> set[str]:
    """Keys of the samples whose baseline is in-sample: the base model was trained on images of their patient.

    Args:
        choice: "none", "all", or a text file with a file name (with or without folder and ending) or a key in
            each line; empty lines and lines that begin with # do not count. Lines about other images are no
            error. One listed image makes all images of its patient in-sample. Where images of several
            patients share a file name, the folder in the line decides.
        samples: the samples in question.

    Raises:
        DataError: there is no such file, it is not UTF-8, none of its lines is an image of these samples, or
            a line may mean several patients.
    """
    if choice == "none":
        return set()
    if choice == "all":
        return {sample.key for sample in samples}
    path = Path(choice)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"--base_trained_on {choice} is no file. Give none, all or a text file.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8. Save it as UTF-8, one file name per line.") from None
    lines = [unicodedata.normalize("NFKC", line).strip().replace("\\", "/") for line in text.splitlines()]
    listed = {PurePosixPath(line): number for number, line in enumerate(lines, 1) if line and line[0] != "#"}
    named: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        for name in _names(sample):
            named[name].append(sample)
    seen = set()
    for line, number in listed.items():
        patients = _patients_of(line, named[line.name])
        if len(patients) > 1:
            raise DataError(
                f"Line {number} of {path.name} may mean images of {len(patients)} patients. Write the folder "
                "of the image too."
            )
        seen |= patients
    if not seen:
        raise DataError(
            f"None of {len(listed)} lines of {path.name} is an image of this data. Write file names or keys "
            "such as P001_S1_F0011, one per line, or give none."
        )
    keys = {sample.key for sample in samples if sample.patient in seen}
    logger.info(
        "the base model was trained on %d of %d patients: %d of %d images are in-sample for it",
        len(seen),
        len({sample.patient for sample in samples}),
        len(keys),
        len(samples),
    )
    return keys


def _patients_of(line: PurePosixPath, samples: Sequence[Sample]) -> set[str]:
    """The patients of the samples that a line names; of several, those with the line's folder."""
    patients = {sample.patient for sample in samples}
    if len(patients) < 2 or not line.parent.name:
        return patients
    folders = {sample: unicodedata.normalize("NFKC", sample.image_path.parent.name) for sample in samples}
    return {sample.patient for sample, folder in folders.items() if folder == line.parent.name} or patients


def _names(sample: Sample) -> set[str]:
    """What a line may call the sample: key, file name, file name without the ending."""
    path = sample.image_path
    return {sample.key, *(unicodedata.normalize("NFKC", name) for name in (path.name, path.stem))}
