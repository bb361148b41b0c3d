"""The data set that is used when the user gives none: the synthetic target domain, drawn once and kept."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from vesselrl.data.synthetic import TARGET, VERSION, write_dataset

logger = logging.getLogger(__name__)

SEED = 7


@dataclass(frozen=True)
class BuiltinSize:
    """How much of the synthetic target domain is drawn; frames of one sequence resemble each other."""

    num_patients: int
    num_sequences: int
    num_frames: int
    size: int


FULL = BuiltinSize(num_patients=128, num_sequences=2, num_frames=5, size=256)
# For the debug preset's 64-px model.
SMALL = BuiltinSize(num_patients=20, num_sequences=1, num_frames=1, size=64)


def builtin_data(output_dir: str | Path, size: BuiltinSize = FULL) -> Path:
    """Folder of the built-in data set below the output folder; drawn when it is not there yet.

    Its name carries a hash of everything that decides its content, so that a
    changed domain gets a new folder.
    """
    content = hashlib.sha256(repr((VERSION, TARGET, SEED, size)).encode()).hexdigest()[:8]
    root = Path(output_dir) / "data" / f"synthetic_target_{size.size}px_{content}"
    if not root.exists():
        logger.info("no --data_root given: drawing %d synthetic angiograms into %s",
                    size.num_patients * size.num_sequences * size.num_frames, root)  # fmt: skip
    return write_dataset(root, TARGET, seed=SEED, **vars(size))
