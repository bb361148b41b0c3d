"""Evaluations made of given numbers, without any mask."""

from collections.abc import Callable, Sequence

import pytest

from vesselrl.evaluation.results import Evaluation, summarise


@pytest.fixture(scope="session")
def made() -> Callable[..., Evaluation]:
    """`made(dice, ...)` -> Evaluation with one image per patient unless `patients` says otherwise."""

    def make(
        dice: Sequence[float],
        patients: Sequence[str] | None = None,
        failed: Sequence[int] = (),
        truth: str = "label",
        skeleton: str = "guo_hall",
        reward_spec: dict | None = None,
        **columns: Sequence[float],
    ) -> Evaluation:
        patients = patients or [f"P{number:03d}" for number in range(1, len(dice) + 1)]
        rows = []
        for number, patient in enumerate(patients):
            row = {"key": f"{patient}_S1_F{number:04d}", "patient": patient, "sequence": f"{patient}_S1"}
            row |= {"failed": number in failed, "truth_hash": f"{truth}{number}", "dice": dice[number]}
            rows.append(row | {name: column[number] for name, column in columns.items()})
        return summarise(rows, {"version": 1, "skeleton": skeleton}, reward_spec)

    return make
