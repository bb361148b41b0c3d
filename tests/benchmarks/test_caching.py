"""Keeping what frozen parts said changes no loss, not in the last bit."""

from pathlib import Path

from vesselrl.benchmarks.caching import SCOPES, benchmark_caching, format_caching
from vesselrl.data.annotations import find_samples


def test_losses_are_the_same_to_the_last_bit(tiny_checkpoint: Path, angiograms: Path) -> None:
    result = benchmark_caching(find_samples(angiograms)[:5], str(tiny_checkpoint), num_rounds=1)
    assert list(result) == list(SCOPES)
    assert [row["same_losses"] for row in result.values()] == [True, True]
    assert "identical" in format_caching(result)
