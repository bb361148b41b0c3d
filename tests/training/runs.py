"""Short trainings with the debug preset, without their charts, and what they wrote."""

import json
from pathlib import Path
from unittest import mock

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from tests.golden.workbench import draw_nothing
from vesselrl.experiment.config import PRESETS
from vesselrl.training import train as training

no_charts = mock.patch.object(Figure, "savefig", draw_nothing)  # charts cost seconds


@no_charts
def train_debug(output: Path, **changes: object) -> training.TrainResult:
    changes = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
    return training.train(PRESETS["debug"].with_(output_dir=str(output), **changes), ["vesselrl", "train"])


def metrics_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors to the last bit."""
    files = [{f.name: load_file(f) for f in folder.glob("*.safetensors")} for folder in (first, second)]
    one, two = ({(f, n): v for f, own in each.items() for n, v in own.items()} for each in files)
    return one.keys() == two.keys() != set() and all(torch.equal(one[name], two[name]) for name in one)
