"""Trains once when it is imported: forks of a server of processes find everything imported and compiled."""

import gc
import io
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2

from tests.training.runs import train_debug

cv2.setNumThreads(1)  # threads do not outlive a fork
with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
    train_debug(Path(folder), stage="sft+rl", num_epochs=2)
gc.collect()
gc.freeze()  # or each fork would look through all that is here, and copy it
