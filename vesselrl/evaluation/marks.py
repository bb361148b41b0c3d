"""What must be said beside every score of a set of images, because it flatters or blurs them."""

from collections.abc import Collection, Sequence

from vesselrl.data.annotations import Sample
from vesselrl.data.splits import Split


def marks_of(split: Split | None, samples: Sequence[Sample], seen: Collection[str] = ()) -> tuple[str, ...]:
    """Sentences to show with every result on these samples; none for a clean set.

    Args:
        split: that they are a side of, if they are; its doubts are among the sentences.
        samples: the images that are scored.
        seen: keys of images that the base model was trained on, as from `base_trained_on`.
    """
    marks = []
    if split is not None and split.is_leaky:
        marks.append(f"{split.mark}.")
    marks += [] if split is None else split.doubts
    num_seen = sum(sample.key in seen for sample in samples)
    if num_seen:
        marks.append(
            f"IN-SAMPLE BASELINE: the base model was trained on patients of {num_seen} of {len(samples)} "
            "images; its scores there are flattered, and gains over it are understated."
        )
    return tuple(marks)
