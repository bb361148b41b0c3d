"""A task says how far it is when it has long been silent, and what is left by its pace."""

import errno
import logging
from unittest.mock import Mock

import pytest
from rich.console import Console

from vesselrl.experiment import progress
from vesselrl.experiment.config import TrainConfig
from vesselrl.experiment.run_folder import RunFolder
from vesselrl.training import logging as logging_module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which tests move."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_most_every_few_seconds_with_what_is_left(clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    with progress.bar(Console(force_terminal=False), "validation") as tell:
        for done in range(1, 101):
            clock[0] += 4.0
            tell(done, 100)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == ["validation: 4 of 100, 6 min left", "validation: 8 of 100, 6 min left"]
    assert lines[-1] == "validation: 96 of 100, 16 s left"
    assert len(lines) == 24


def test_what_is_soon_done_says_nothing(clock, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress.logged([1, 2, 3], "images")) == [1, 2, 3]
    assert not caplog.records


def test_hours_and_a_run_that_goes_on(clock) -> None:
    """Steps that were done before the interruption say nothing about the pace."""
    pace = progress.Pace()
    assert pace.left(1000, 2000) == ""
    clock[0] += 60.0
    assert pace.left(1010, 2000) == ", 1 h 39 min left"  # 990 steps of 6 s
    assert pace.left(2000, 2000) == ""


def test_what_is_left_of_a_training_counts_ppo_steps_for_what_they_cost(clock, caplog, tmp_path) -> None:
    """Of 50 steps 40 are supervised, of 30 s; the others pass over their images three times as often."""
    caplog.set_level(logging.INFO)
    run = Mock(spec=RunFolder, path=tmp_path)
    config = TrainConfig.from_dict({"stage": "sft+rl", "num_epochs": 3, "num_passes": 2, "log_freq": 1})
    with logging_module.Monitor(run, config, total_steps=50) as monitor:
        for step in range(1, 51):
            clock[0] += 30.0 if step <= 40 else 90.0
            monitor.log_step(step, {"train/loss": 0.5})
    lines = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert lines[0] == "step 1 of 50"
    assert lines[19] == "step 20 of 50, 25 min left"  # 20 of 30 s, 10 of 90 s
    assert lines[43] == "step 44 of 50, 9 min left"  # 6 of 90 s
    assert lines[-1] == "step 50 of 50"


def test_a_log_file_on_a_full_disk_hides_nothing(monkeypatch, tmp_path, capsys) -> None:
    log = progress.LogFile(tmp_path, "sft", logging.Formatter())
    monkeypatch.setattr(log, "baseFilename", "/dev/full")

    def train() -> None:
        with log:
            logging.getLogger().warning("step 1")
            raise OSError(errno.ENOSPC, "the model's")

    with pytest.raises(OSError, match="the model's"):
        train()
    assert "Traceback" not in capsys.readouterr().err
