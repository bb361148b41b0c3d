"""A second observer: how well two people agree on the same images, the ceiling for any model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vesselrl.data.annotations import Sample, load_mask
from vesselrl.data.images import read_size
from vesselrl.data.splits import relative_paths
from vesselrl.errors import DataError
from vesselrl.evaluation.predictions import evaluate_masks
from vesselrl.evaluation.results import Evaluation
from vesselrl.scoring.rewards import Reward

MASK_SUFFIXES = ("_mask.png", ".png", ".tif", ".tiff")


def second_observer(samples: Sequence[Sample], folder: Path | str) -> list[Sample]:
    """The same images with the masks of another folder, `<image>_mask.png` or `<image>.png`.

    Masks may lie in folders as the images do; where images share a name, they must.

    Raises:
        DataError: there is no such folder, an image has no mask of its own in it, or a mask has another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Give the folder with the second observer's masks.")
    others = []
    shared = Counter(sample.image_path.stem for sample in samples)
    for sample, below in zip(samples, relative_paths(samples), strict=True):
        stems = [below.with_suffix("")]
        stems += [sample.image_path.stem] if shared[sample.image_path.stem] == 1 else []
        tried = (folder / f"{stem}{end}" for stem in stems for end in MASK_SUFFIXES)
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise DataError(
                f"{sample.key}: the second observer has no mask of it in {folder}. Name the masks as the "
                "images, or leave the second observer out."
            )
        record = f"{sample.record}: second observer"
        size, image_size = read_size(path, record), read_size(sample.image_path, sample.record)
        if size != image_size:
            raise DataError(
                f"{record}: the mask has {size[0]}×{size[1]} px, its image {image_size[0]}×{image_size[1]} "
                "px. Bring the mask to the size of the image (nearest neighbour)."
            )
        others.append(replace(sample, mask_path=path, polygons=None, record=record))
    return others


def observer_agreement(
    first: Sequence[Sample], second: Sequence[Sample], reward: Reward | None = None
) -> Evaluation:
    """Scores the second observer's masks against the first's, exactly as a model is scored.

    The result has the image list and the true masks (the first observer's) of a model's evaluation on the
    same samples, so that both can stand in one table.

    Args:
        first: samples with the masks that count as the truth.
        second: the same images in any order with the other masks, e.g. from `second_observer`.
        reward: column `reward`, as for a model.

    Raises:
        DataError: the two hold different images.
    """
    others = {sample.key: sample for sample in second}
    different = sorted({sample.key for sample in first} ^ others.keys())
    if different:
        raise DataError(
            f"The two observers marked different images: {len(different)} are with one only "
            f"({', '.join(different[:5])}). Give both the same images."
        )
    return evaluate_masks(first, lambda sample: load_mask(others[sample.key]), load_mask, reward)
