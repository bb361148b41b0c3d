"""Samples without files, for tests that only ask who is on which side."""

import random
from pathlib import Path

from vesselrl.data.samples import Sample


def make_samples(sizes, num_sequences=1):
    """Samples without files: sizes[i] frames of patient i + 1, over its sequences in turn."""
    samples = []
    for patient, size in enumerate(sizes, start=1):
        for frame in range(size):
            sequence = f"P{patient:03d}_S{frame % num_sequences + 1}"
            key = f"{sequence}_F{frame:04d}"
            path = Path(f"/data/images/LI_MING_{patient}_{frame}.png")
            samples.append(Sample(path, None, (), key, key, f"P{patient:03d}", sequence, f"F{frame:04d}"))
    return samples


def sides(split):
    return split.train, split.val, split.test


def patients_of(side):
    return {sample.patient for sample in side}


def uneven_sizes(seed):
    """Numbers of frames of 3 to 40 patients."""
    generator = random.Random(seed)
    return [generator.randint(1, 60) for _ in range(generator.randint(3, 40))]
