"""vesselrl fine-tunes Sa2VA to segment blood vessels and measures whether that helped.

The public names below are loaded on first use, so that `import vesselrl` is instant and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "MultiObjectiveReward": "vesselrl.scoring.rewards",
    "PostProcessing": "vesselrl.scoring.postprocessing",
    "Predictor": "vesselrl.inference.predictor",
    "RecallFocusedReward": "vesselrl.scoring.rewards",
    "SimpleDiceReward": "vesselrl.scoring.rewards",
    "get_reward_function": "vesselrl.scoring.rewards",
    "load_sa2va": "vesselrl.models.checkpoint",
}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _read_version()
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vesselrl' has no attribute {name!r}. It offers: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _read_version() -> str:
    """The installed version, or that of pyproject.toml in a clone that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("vesselrl")
    except metadata.PackageNotFoundError:
        import tomllib
        from pathlib import Path

        pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]
