"""The two lists of docs/explanation/code-paths.md are what really runs, in this order; a PPO step is near."""

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

from vesselrl.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "explanation" / "code-paths.md"
LINE = re.compile(r"^\d+\. `([\w.]+)` in `(vesselrl/[\w/]+\.py)`", re.MULTILINE)


def listed(title: str) -> list[tuple[str, str]]:
    """Function and file of each line below a heading of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return LINE.findall(text)


def traced(run: Callable[[], int]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The package's functions in the order of their calls, and how deep below `train` each was at least."""
    calls, depths = [], {}

    def watch(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(f"{ROOT}/vesselrl/"):
            return
        name = frame.f_code.co_qualname
        calls.append((name, str(Path(file).relative_to(ROOT))))
        depth, outer = 0, frame
        while outer is not None and outer.f_code.co_name != "train":
            depth += outer.f_code.co_filename.startswith(f"{ROOT}/vesselrl/training/")
            outer = outer.f_back
        if outer is not None:
            depths[name] = min(depth, depths.get(name, depth))

    threading.setprofile(watch)  # masks are scored in threads
    sys.setprofile(watch)
    try:
        assert run() == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls, depths


def assert_in_order(expected: list[tuple[str, str]], calls: list[tuple[str, str]]) -> None:
    assert 0 < len(expected) <= 8
    at = 0
    for call in expected:
        assert call in calls[at:], f"{call} is not called after the lines above it"
        at = calls.index(call, at) + 1


@pytest.mark.slow
def test_one_training_step_runs_as_described(tiny_checkpoint: Path, angiograms: Path, tmp_path: Path) -> None:
    words = ["--model_path", tiny_checkpoint, "--data_root", angiograms, "--output_dir", tmp_path]
    calls, depths = traced(lambda: main(["train", "--preset", "debug", *map(str, words)]))
    assert_in_order(listed("One training step"), calls)
    assert depths["PPOUpdate.step"] <= 3


def test_one_prediction_runs_as_described(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(tmp_path / "image.png")
    words = ["--base_model", tiny_checkpoint, "--image", tmp_path / "image.png"]
    words += ["--output_dir", tmp_path / "out"]
    calls, _ = traced(lambda: main(["predict", *map(str, words)]))
    assert_in_order(listed("One prediction"), calls)


@pytest.mark.parametrize("wrong", [[("train", "vesselrl/training/ppo.py")], [("b", "f"), ("a", "f")]])
def test_a_wrong_list_is_noticed(wrong: list[tuple[str, str]]) -> None:
    with pytest.raises(AssertionError):
        assert_in_order(wrong, [("a", "f"), ("train", "vesselrl/training/train.py"), ("b", "f")])
