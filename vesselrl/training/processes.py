"""Several processes of one training, as torchrun or `accelerate launch` start them.

Each takes its share of every batch and validation; gradients are summed and metrics gathered, so that all
take the same decisions. The main one alone writes to the run folder.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, TypeVar

from vesselrl.errors import PeerOutOfMemoryError, Stopped
from vesselrl.experiment import stop

if TYPE_CHECKING:  # the command line asks for the rank before it needs torch
    from torch import nn

T = TypeVar("T")

blank_pass: Callable[[], object] | None = None  # through a model of which each process holds a share
PATIENCE = timedelta(hours=6)  # for what the main process does alone, such as the check of a large data set


def count() -> int:
    """Number of processes, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def use_fsdp() -> bool:
    """Whether `accelerate launch --use_fsdp` has started several processes, with settings that we know."""
    if count() == 1 or os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return False
    # Weights that stay whole after a pass would be gathered again only where an adapter was saved.
    needed = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    for name, value in needed.items():
        if (found := os.environ.get(name, value)) != value:
            raise ValueError(f"FSDP needs accelerate's --{name.lower()} {value}; it is {found}.")
    return True


@contextmanager
def connected() -> Iterator[None]:
    """Connects the processes for the length of a `with` block: by NCCL between GPUs, else by gloo."""
    if count() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    with peers():
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    yield
    state.destroy_process_group()  # after an error it could wait for one that is gone


@contextmanager
def peers(words: str = "") -> Iterator[None]:
    """Turns what comes of a lost process, an error with these words, into a ConnectionError that says so."""
    try:
        yield
    except RuntimeError as error:
        if words not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        fault = f"Process {rank()} of {count()} has lost the others ({reason})"
        raise ConnectionError(f"{fault}: one of them has ended, and says why.") from error


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, n being the number of processes: those of this one."""
    return items[rank() :: count()]


def announce_pass() -> None:
    """To be called before a pass through a model whose weights all processes bring together, see `gather`."""
    if blank_pass is not None:
        _gather([True])


def gather(items: list[T]) -> list[T]:
    """The items of all processes in the order of `share`; meanwhile joins passes that others announce."""
    if count() == 1:
        return items
    while blank_pass is not None and any(_gather([False])):
        blank_pass()
    return _gather(items)


def _gather(items: list[T] | None) -> list[T]:
    """The items of all; None: this process is out of memory, and so none can go on."""
    from accelerate.utils import gather_object

    with peers():
        shares = gather_object([None if items is None else [(item,) for item in items]])
    if None in shares:
        raise PeerOutOfMemoryError("another process is out of memory")
    return [item for one in chain(*zip_longest(*shares)) if one for item in one]


def tell_out_of_memory() -> None:
    """Ends the step of the other processes too, by an error in the `gather` that they come to next."""
    if count() > 1:
        with suppress(PeerOutOfMemoryError):
            _gather(None)


def any_of(flag: bool) -> bool:
    """Whether a condition holds in one of the processes."""
    return any(gather([flag]))


def from_main(compute: Callable[[], T]) -> T:
    """What a function returns that the main process alone calls; where it fails, all end."""
    if count() == 1:
        return compute()
    from accelerate.utils import broadcast_object_list

    made, error = None, None
    if is_main():
        try:
            made = compute()
        except Exception as raised:
            error = raised
    gather([])  # the others take part in its passes
    sent = [made, error is None]
    with peers():
        broadcast_object_list(sent)
    if error is not None:
        raise error
    if not sent[1]:
        raise SystemExit(1)  # the main process says why
    return sent[0]


def sum_gradients(parameters: "Iterable[nn.Parameter]") -> None:
    """Sums the gradients of all processes; a weight without one stays so where no process has one."""
    if count() == 1:
        return
    import torch
    from accelerate.utils import reduce

    gather([])  # nobody is out of memory
    parameters = [*parameters]
    known = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    with peers():
        total = reduce(torch.cat([known, *(part.flatten().float() for part in parts)]), "sum")
    known, *parts = total.split([len(parameters), *(p.numel() for p in parameters)])
    for p, number, part in zip(parameters, known.tolist(), parts, strict=True):
        p.grad = part.view_as(p).to(p.dtype) if number else None


@contextmanager
def stopping_together() -> Iterator[None]:
    """Among several processes a signal waits inside for the next `stop_together`."""
    with stop.finish_first() if count() > 1 else nullcontext():
        yield


def stop_together() -> None:
    """Raises Stopped in all processes where one of them has got a signal."""
    if count() > 1 and (numbers := [number for number in gather([stop.waiting()]) if number]):
        raise Stopped(numbers[0])
