"""Official Sa2VA checkpoint folders to a native model and back; safetensors only, no code of theirs is run.

Every official tensor is used, known to be unused, or an error, and every native one is filled, or an error.
"""

import ctypes
import logging
import math
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vesselrl.errors import CheckpointError
from vesselrl.experiment.run_folder import atomic_write, check_room, write_json
from vesselrl.models.config import (
    SAM2_SIDECAR,
    Sa2VAConfig,
    Sam2Dimensions,
    read_config,
    read_json_object,
    unreadable,
)
from vesselrl.models.families import KeyMap, has_two_decoders, refuse_known
from vesselrl.models.processing import Sa2VAProcessor, load_tokenizer
from vesselrl.models.sa2va import HEAD, DetailHead, Sa2VA

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
DETAIL_HEAD = "detail_head.safetensors"  # beside a checkpoint or an adapter; official code passes it over
EMBEDDED = Path(__file__).parent / "embedded"
PRETRAINED_HEAD = Path(__file__).with_name(DETAIL_HEAD)
# Trained weights stay below about 1e3 (the largest are biases of Qwen2's keys); the top exponent bit,
# flipped, makes 1e34 of 1e-4.
LARGEST_WEIGHT = 1e4
LARGE_BYTES = 1e9  # of a checkpoint whose memory counts more than the speed of small steps
_REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?")
_FETCHED = ["*.safetensors", "*.json", "merges.txt", "tokenizer.model", "LICENSE*"]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_sa2va(
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sam2: Sam2Dimensions | None = None,
    without: tuple[str, ...] = (),
) -> tuple[Sa2VA, Sa2VAProcessor]:
    """Loads a model, without gradients, and its processor; a CheckpointError names what is at fault.

    `path` is a folder with config.json, safetensors shards and tokenizer files, or None for the embedded
    miniature; `dtype` that of vision tower, projector and language model: SAM2 and its prompt projection stay
    float32, but on a GPU SAM2's image encoder then computes in bfloat16; `sam2` overrides the dimensions in
    the side-car. Parts whose names begin with one of `without` are not read, and None in the model.
    """
    folder = checkpoint_folder(path)
    config = read_config(folder, sam2)
    processor = Sa2VAProcessor(config, load_tokenizer(folder))
    shards = shard_files(folder)
    if sum(file.stat().st_size for file in shards) > LARGE_BYTES:
        return_freed_memory()
    model = empty_model(config, [*chain.from_iterable(map(read_shapes, shards))], str(folder))
    model.leave_out(without)
    state = native_state(model, read_tensors(folder, model.keys, without), dtype, str(folder))
    model.load_state_dict(state, strict=True, assign=True)
    # Rotary tables are computed, not stored; on the meta device they are still empty.
    for name, module in [] if model.lm is None else [*model.lm.named_modules()]:
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.lm.set_submodule(name, type(module)(module.config))
    if model.sam is not None and (folder / DETAIL_HEAD).is_file():
        model.detail = load_detail_head(folder / DETAIL_HEAD)
    model.autocasts = dtype == torch.bfloat16 and torch.device(device).type == "cuda"
    model.image_token_id, model.seg_token_id = processor.image_token_id, processor.seg_token_id
    if config.family.is_whole and model.lm is not None:
        model.lm.config.image_token_id = processor.image_token_id
    rows = config.native_llm().get_text_config().vocab_size
    if max(processor.image_token_id, processor.seg_token_id) >= rows:
        raise CheckpointError(f"{folder}: the tokenizer has ids beyond the {rows} rows of embeddings.")
    return model.requires_grad_(False).eval().to(device), processor


def return_freed_memory() -> None:
    """Has glibc give every block of 1 MB or more back to the system as soon as it is freed.

    By itself it keeps those below 32 MB, in pieces: a training step of a 1B took 2.7 times the memory. Small
    models would lose speed to new pages of memory; a 1B lost none. Other C libraries stay as they are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD of malloc.h


def checkpoint_folder(path: str | Path | None) -> Path:
    """The folder of a model: None is the embedded miniature; see `local_folder`."""
    return EMBEDDED if path is None else local_folder(path, _FETCHED, "--model_path")


def local_folder(path: str | Path, files: list[str], option: str) -> Path:
    """A folder of this machine; what is none but reads as ORG/NAME or ORG/NAME@REVISION is downloaded.

    Only the files named are fetched, into Hugging Face's cache; never code or pickles.
    """
    match = None if Path(path).exists() else _REPOSITORY.fullmatch(Path(path).as_posix())
    if not match:
        return Path(path)
    name, revision = match.groups()
    refuse_known(name, name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        fault = f"{path} is no folder here, and Hugging Face gives no such model ({reason})"
        todo = f"`hf download {name}` on a machine with a network; then give {option} the folder"
        raise CheckpointError(f"{fault}. Check the name, or run {todo}.") from None
    logger.info("%s, revision %s", name, folder.name)
    return folder


def empty_model(config: Sa2VAConfig, official: Collection[str], source: str) -> Sa2VA:
    """A model without values, with the key map that these official tensors need."""
    refuse_known(" ".join({".".join(name.split(".")[:3]) for name in official}), source)
    try:
        with torch.device("meta"):
            model = Sa2VA(config)
    except Exception as error:  # transformers checks its configurations in many ways
        fault = f"{source}: no model can be built from config.json and {SAM2_SIDECAR}"
        raise CheckpointError(f"{fault} ({' '.join(str(error).split())}). Copy them again.") from None
    model.keys = KeyMap(config.family, config.heads, has_two_decoders(official))
    return model


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each of which exists."""
    if names := sorted(set(read_index(folder).values())):
        if missing := [name for name in names if not (folder / name).is_file()]:
            lacks = f"{folder} lacks {len(missing)} of {len(names)} shards named in {INDEX}"
            raise CheckpointError(f"{lacks}: {', '.join(missing)}.")
        return [folder / name for name in names]
    if not (files := sorted(folder.glob("model*.safetensors"))):
        raise CheckpointError(f"{folder} holds no model*.safetensors file; pickled weights are not read.")
    return files


def read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor as the index has it; empty where there is no index."""
    index = folder / INDEX
    if not index.exists():
        return {}
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no `weight_map` object. Copy it again from the source.")
    # Plain file names only: `../other.safetensors`, an absolute path or a number would leave the folder.
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            fault = f"{index} names {name!r:.60}, which is no file of this folder"
            raise CheckpointError(f"{fault}. Copy it again from the source.")
    return weight_map


def read_tensors(
    folder: Path, keys: KeyMap | None = None, without: tuple[str, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yields official names and tensors of all shards, one at a time; what a mask needs holds numbers.

    With `keys`, those whose native name begins with one of `without` are not read.
    """

    def is_read(name: str) -> bool:
        return not (without and (keys.natives(name) or ("",))[0].startswith(without))

    for name, tensor in chain.from_iterable(read_shard(file, is_read) for file in shard_files(folder)):
        if keys is None or not keys.is_unused(name):
            check_weight(name, tensor, folder)
        yield name, tensor


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the header of one safetensors file."""
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from None


def check_weight(name: str, tensor: Tensor, source: Path) -> None:
    """Refuses a tensor with nan, infinity or a value that no trained weight has."""
    if tensor.dtype not in _FLOATS:
        fault = f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{fault}; quantised weights are not read. Give the original, in floats.")
    # The extremes of a tensor with a nan are nan.
    largest = max(abs(float(end)) for end in tensor.aminmax()) if tensor.numel() else 0.0
    if not largest <= LARGEST_WEIGHT:
        is_number = math.isfinite(largest)
        found = f"values as large as {largest:.3g}" if is_number else f"{largest} instead of numbers"
        fault = f"{source}: {name} holds {found}; weights are below {LARGEST_WEIGHT:g}"
        raise CheckpointError(f"{fault}. The file is damaged or its training has failed: take another copy.")


def read_shard(
    file: Path, is_read: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Yields names and tensors of one safetensors file, those whose name is to be read."""
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no dict)
                if is_read(name):
                    yield name, shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from None


def native_state(
    model: Sa2VA, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: str = "The checkpoint"
) -> dict[str, Tensor]:
    """Builds the model's state dict from official tensors; the error lists all that do not fit."""
    expected, keys = model.state_dict(), model.keys
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    unknown, is_sa2va = [], False
    for official, tensor in tensors:
        is_sa2va |= official.startswith("grounding_encoder.")
        if keys.is_unused(official):
            continue
        natives = keys.natives(official)
        if natives is None or not expected.keys() >= set(natives):
            unknown.append(official)
            continue
        for name, place, part in keys.split(official, tensor):
            wanted = torch.float32 if name.startswith(("sam.", "text_hidden_fcs.")) else dtype
            found[name][place] = part.to(wanted).contiguous()
    state, wrong = {}, []
    for name, rows in found.items():
        parts = [rows[k] for k in sorted(rows)]
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        got, shape = tuple(state[name].shape), tuple(expected[name].shape)
        if got != shape:
            wrong.append(f"{keys.officials(name)[0]} {got} (model {name}: {shape})")
    head = f"{HEAD[0]}weight"
    if model.config.is_tied and head in expected:
        embedding = next(name for name in expected if name.endswith("embed_tokens.weight"))
        if embedding in state:
            state.setdefault(head, state[embedding])
    missing = dict.fromkeys(keys.officials(name)[0] for name in sorted(expected.keys() - state.keys()))
    problems = {"missing": [*missing], "wrong shape": wrong, "unknown": unknown}
    if any(problems.values()):
        kinds = [f"{len(names)} {kind}: {'; '.join(names[:3])}" for kind, names in problems.items() if names]
        advice = _advice(is_sa2va, problems, len(state))
        raise CheckpointError(f"{source} does not fit its config.json. {' | '.join(kinds)}. {advice}")
    return state


def _advice(is_sa2va: bool, problems: dict[str, list[str]], num_filled: int) -> str:
    """What to do about tensors that do not fit."""
    if not is_sa2va:
        no_sam2 = "It has no grounding_encoder: a language model alone, or SAMTok, is no Sa2VA"
        return f"{no_sam2}. Give the folder of a Sa2VA with all of its shards."
    if problems["missing"] and problems["unknown"]:
        return "These are the tensors of another family: take config.json from the source of the shards."
    if problems["missing"]:
        return f"Only a part was copied ({num_filled} tensors fit): copy all shards and the index again."
    if problems["unknown"]:
        return "The model has parts that config.json does not name: take both from one source."
    files = f"config.json and {SAM2_SIDECAR}"
    return f"The sizes are of another model: take {files} from the source of the shards."


def describe_config(config: Sa2VAConfig, processor: Sa2VAProcessor) -> str:
    """One line on the model's shape for logs."""
    vision, llm = (
        f"{part.get('num_hidden_layers', part.get('depth'))}x{part['hidden_size']}"
        for part in (config.vision, config.llm)
    )
    sam2 = f"{'-'.join(map(str, config.sam2.blocks_per_stage))} at {config.sam2.image_size} px"
    seg = f"[SEG] {processor.seg_token_id}"
    return f"{config.kind}, vision {vision}, LM {llm}, SAM2 {sam2}, tile {config.tile_px} px, {seg}"


def save_sa2va(model: Sa2VA, folder: Path) -> None:
    """Writes config.json, the SAM2 side-car and model.safetensors in float32, but no tokenizer."""
    write_json(folder / "config.json", model.config.to_dict())
    write_json(folder / SAM2_SIDECAR, asdict(model.config.sam2))
    state, keys = model.state_dict(), model.keys
    names = dict.fromkeys(official for native in state for official in keys.officials(native))
    tensors = {name: keys.join(name, state).detach().to("cpu", torch.float32) for name in names}
    with atomic_write(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def save_detail_head(head: DetailHead, file: Path) -> None:
    """Writes the weights of a detail head as one safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    with atomic_write(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_detail_head(file: Path = PRETRAINED_HEAD) -> DetailHead:
    """Reads a detail head, by default the package's; a CheckpointError says what is wrong with the file."""
    head, tensors = DetailHead(), dict(read_shard(file))
    for name, tensor in tensors.items():
        check_weight(name, tensor, file)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        fault = f"{file} holds no detail head of this version ({' '.join(str(error).split()):.200})"
        raise CheckpointError(f"{fault}. Copy it again.") from None
    return head.requires_grad_(False).eval()


def copy_with_weights(
    source: Path, target: Path, model: Sa2VA, changed: Collection[str], dtype: torch.dtype | None = None
) -> set[torch.dtype]:
    """Copies a checkpoint with the model's values of its `changed` native tensors, the rest from the source.

    In `dtype`, or in that of each tensor: what has not changed then stays what it was bit for bit. Returns
    the kinds of numbers that were written.
    """
    shards, keys = shard_files(source), model.keys
    check_room(target.parent, 1.05 * sum(file.stat().st_size for file in shards), "the merged copy")
    state, written = model.state_dict(), set()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*(file.name for file in shards)))
    for file in shards:
        tensors = {}
        for name, original in read_shard(file):
            is_changed = not keys.is_unused(name) and not {*keys.natives(name)}.isdisjoint(changed)
            new = keys.join(name, state) if is_changed else original
            tensors[name] = new.detach().to("cpu", dtype or original.dtype).contiguous()
            written.add(tensors[name].dtype)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    if model.detail:
        save_detail_head(model.detail, target / DETAIL_HEAD)
    return written
