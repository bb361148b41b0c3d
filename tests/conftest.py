"""What every test may rely on: no network, few threads, no window for plots."""

import os

# Before torch, transformers or matplotlib is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("vesselrl", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vesselrl")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return ROOT


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Optional real data beside the clone; a test that asks for it is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let tests reach this machine only."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and not is_loopback(address[0]):
            raise RuntimeError(f"A test tried to reach {address[0]}; tests must not need a network.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random miniature Sa2VA in the official layout, for 64-px images; tests must not write into it."""
    from vesselrl.models.miniature import DEBUG_SAM2, miniature_config, random_sa2va, write_miniature

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config = miniature_config(DEBUG_SAM2)
    write_miniature(folder, config, random_sa2va(config, seed=3))
    return folder
