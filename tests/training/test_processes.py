"""Several processes train as one does: the same weights, one run folder, and none is left waiting."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import metrics_of, train_debug
from vesselrl.training import processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FSDP = "--use_fsdp --fsdp_version=2 --num_processes=2 --num_machines=1 --main_process_port=0"
FSDP = [sys.executable, "-m", "accelerate.commands.launch", *FSDP.split()]
SCOPE = {"lora_scope": ("language_model", "mask_decoder")}
both_ways = pytest.mark.parametrize(("launcher", "changes"), [(TORCHRUN, {}), (FSDP, SCOPE)])
# Of four images a process has two and one in the first step of an epoch, one and none in the second.
SETTINGS = {"stage": "sft+rl", "num_epochs": 3, "rl_epochs": 2, "batch_size": 3, "val_freq": 100}
LONG = SETTINGS | {"num_epochs": 10, "rl_epochs": 8}
FUNCTIONS = """
import torch
from torch.nn import Parameter
from vesselrl.training import processes as p

with p.connected():
    assert p.count() == 2 and p.is_main() == (p.rank() == 0)
    assert p.gather([*p.share(range(5))]) == [0, 1, 2, 3, 4] and p.gather([None] * p.rank()) == [None]
    assert p.any_of(p.rank() == 1) and not p.any_of(False)
    assert p.from_main(p.rank) == 0
    one, other, none = (Parameter(torch.zeros(2, 3)) for _ in range(3))
    one.grad = torch.full((2, 3), 1.0 + p.rank())
    other.grad = torch.ones(2, 3) if p.rank() == 1 else None
    p.sum_gradients([one, other, none])
    assert one.grad.tolist() == [[3] * 3] * 2 and other.grad.tolist() == [[1] * 3] * 2 and none.grad is None
    try:
        p.from_main(lambda: int("x"))
    except (ValueError, SystemExit) as error:
        assert isinstance(error, ValueError) == p.is_main()
    else:
        raise AssertionError
"""

SHARES = """
import os
from torch.distributed.tensor import DTensor
from vesselrl.experiment.config import PRESETS
from vesselrl.training import processes
from vesselrl.training.policy import load_policy

config = PRESETS["debug"].with_(lora_scope=("language_model", "mask_decoder"))
with processes.connected():
    policy = load_policy(config, "cpu")
    layers = [*policy.model.language_layers().parameters()]
    assert all(isinstance(p, DTensor) != p.requires_grad for p in layers)
    weights = [p for p in layers if not p.requires_grad]
    held = sum(p.to_local().nbytes for p in weights) / sum(p.nbytes for p in weights)
    assert 0.5 <= held < 0.52, held
    del os.environ["ACCELERATE_USE_FSDP"]
    whole = load_policy(config, "cpu")
    assert policy.identity() == whole.identity()
"""


OUT_OF_MEMORY = """
import os
import torch
from vesselrl.cli import main
from vesselrl.models.sa2va import Sa2VA

encode, calls = Sa2VA.encode_image, []

def encode_image(self, pixels):
    calls.append(torch.is_grad_enabled())
    if os.environ["RANK"] == "1" and calls[-1] and sum(calls) in (2, 9):  # a supervised step, and one of PPO
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return encode(self, pixels)

Sa2VA.encode_image = encode_image
main()
"""


def launch(
    output: Path, arguments: list[str], settings: dict, program: tuple[str, ...] = ("-m", "vesselrl")
) -> subprocess.Popen:
    scope = settings.get("lora_scope", ("projector", "mask_decoder", "image_encoder"))
    words = [f"--{name}={value}" for name, value in settings.items() if name != "lora_scope"]
    words += ["--lora_scope", *scope]
    command = [*program, "train", "--preset=debug", f"--output_dir={output}", "--log_freq=1", *words]
    log = (output.parent / f"{output.name}.log").open("a")
    return subprocess.Popen([*arguments, *command], stdout=log, stderr=log)


def the_run(output: Path) -> Path:
    (folder,) = output.glob("sa2va_*")
    return folder


def wait_for(output: Path, text: str) -> None:
    log, start = output.parent / f"{output.name}.log", time.monotonic()
    while text not in log.read_text():
        assert time.monotonic() - start < 120, log.read_text()
        time.sleep(0.05)


def check_same(one: Path, other: Path) -> None:
    """The same files, weights to 1e-5, and metrics of steps and validations to 1e-6 of their size."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for name in ("best_lora", "final_lora"):
        first, second = (load_file(run / name / "adapter_model.safetensors") for run in (one, other))
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)
    for first, second in zip(metrics_of(one), metrics_of(other), strict=True):
        validation = any(name.startswith("val/") for name in first)
        close = pytest.approx(first, rel=1e-6 if validation else 1e-3, abs=1e-6, nan_ok=True)
        assert second == close


def test_what_processes_tell_each_other() -> None:
    done = subprocess.run([*TORCHRUN, "--no-python", sys.executable, "-c", FUNCTIONS], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_rank_alone_makes_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # as a scheduler may leave it
    assert processes.is_main()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_with_a_share_of_the_model_each_train_as_one(tmp_path: Path) -> None:
    two = launch(tmp_path / "two", FSDP, SETTINGS | SCOPE)
    one = train_debug(tmp_path / "one", **SETTINGS | SCOPE).folder
    assert two.wait() == 0, (tmp_path / "two.log").read_text()
    check_same(one, the_run(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_also_where_one_is_out_of_memory(tmp_path: Path) -> None:
    """All take the step again."""
    (tmp_path / "train.py").write_text(OUT_OF_MEMORY)
    two = launch(tmp_path / "two", TORCHRUN, SETTINGS, (str(tmp_path / "train.py"),))
    one = train_debug(tmp_path / "one", **SETTINGS).folder
    log = (tmp_path / "two.log").read_text
    assert two.wait() == 0, log()
    for cause in ("CUDA out of memory", "another process is out of memory"):
        assert log().count(f"out of memory ({cause}); the step is taken again") == 2
    check_same(one, the_run(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_with_fsdp_each_process_holds_half_of_the_language_model(tmp_path: Path) -> None:
    (tmp_path / "shares.py").write_text(SHARES)
    done = subprocess.run([*FSDP, tmp_path / "shares.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_two_processes_goes_on_with_one(tmp_path: Path) -> None:
    output = tmp_path / "two"
    two = launch(output, TORCHRUN, LONG)
    wait_for(output, "step 9 of")  # of PPO
    two.send_signal(signal.SIGTERM)
    assert two.wait(30) != 0
    run, log = the_run(output), (tmp_path / "two.log").read_text()
    assert f"Go on with: vesselrl train --resume_from {run}" in log
    assert not (run / "training_info.json").exists()
    done = subprocess.run([sys.executable, "-m", "vesselrl", "train", "--resume_from", run])
    assert done.returncode == 0
    check_same(train_debug(tmp_path / "one", **LONG).folder, run)


@pytest.mark.slow
@pytest.mark.timeout(300)
@both_ways
@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_process_is_killed_the_other_ends(tmp_path: Path, killed: int, launcher, changes) -> None:
    output = tmp_path / "two"
    two = launch(output, launcher, LONG | changes)
    wait_for(output, "step 3 of")
    ids = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(one.split("=", 1) for one in path.read_text().split("\0") if "=" in one)
            command = (path.parent / "cmdline").read_text()
        except OSError:  # of another user, or just ended
            continue
        if f"--output_dir={output}" in command and "RANK" in variables:
            ids[int(variables["RANK"])] = int(path.parent.name)
    os.kill(ids[killed], signal.SIGKILL)
    assert two.wait(30) != 0
    assert not Path(f"/proc/{ids[1 - killed]}/cmdline").exists()
    log = (tmp_path / "two.log").read_text()
    assert f"Process {1 - killed} of 2 has lost the others" in log or "closing signal SIGTERM" in log
    assert f"Signal 9 (SIGKILL) received by PID {ids[killed]}" in log


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_launches_at_once_in_a_new_folder_both_finish(tmp_path: Path) -> None:
    both = [launch(tmp_path / "new", TORCHRUN, SETTINGS) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0], (tmp_path / "new.log").read_text()
    one, other = (tmp_path / "new").glob("sa2va_*")
    check_same(one, other)


@pytest.mark.slow
def test_an_error_is_said_once_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert launch(tmp_path / "two", TORCHRUN, {"data_root": tmp_path}).wait() != 0
    log = (tmp_path / "two.log").read_text()
    assert log.count("error: ") == 1
    assert not list((tmp_path / "two").glob("sa2va*"))
