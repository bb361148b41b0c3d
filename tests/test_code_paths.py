"""The two lists of docs/explanation/code-paths.md are what really runs, in this order; a PPO step is near."""

import re
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest

from vesselrl.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "explanation" / "code-paths.md"
LINE = re.compile(r"^\d+\. `([\w.]+)` in `(vesselrl/[\w/]+\.py)`", re.MULTILINE)


def traced(words: list[str]) -> tuple[list[tuple[str, str]], dict[str, int]]:
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
        assert main(words) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls, depths


WORDS = {
    "One training step": "train --preset debug --model_path {model} --data_root {data} --output_dir {out}",
    "One prediction": "predict --base_model {model} --image {data}/images --output_dir {out}",
}


@pytest.mark.parametrize("title", WORDS)
def test_the_listed_functions_run_in_this_order(
    title: str, tiny_checkpoint: Path, angiograms: Path, tmp_path: Path
) -> None:
    words = WORDS[title].format(model=tiny_checkpoint, data=angiograms, out=tmp_path).split()
    calls, depths = traced(words)
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    expected, at = LINE.findall(text), 0
    assert 0 < len(expected) <= 8
    for call in expected:
        assert call in calls[at:], f"{call} is not called after the lines above it"
        at = calls.index(call, at) + 1
    assert depths.get("PPOUpdate.step", 0) <= 3
    assert words[0] == "predict" or "PPOUpdate.step" in depths
