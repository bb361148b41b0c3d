"""Official Sa2VA checkpoint folders to a native model and back; safetensors only, no code of theirs is run.

Every official tensor is used, known to be unused, or an error, and every native one is filled, or an error.
"""

import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase, Qwen2Tokenizer

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
from vesselrl.models.processing import Sa2VAProcessor
from vesselrl.models.sa2va import NAMES, POINTS, UNUSED, Sa2VA

INDEX = "model.safetensors.index.json"
EMBEDDED = Path(__file__).parent / "embedded"
# Trained weights stay below about 1e3 (the largest are biases of Qwen2's keys); the top exponent bit,
# flipped, makes 1e34 of 1e-4.
LARGEST_WEIGHT = 1e4
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_EMBEDDING, _HEAD = "lm.model.embed_tokens.weight", "lm.lm_head.weight"
_ROWS = [
    [prefixes[k > 0] + name for k, name in enumerate(row.split())]
    for prefixes, text in NAMES.items()
    for row in text.strip().splitlines()
]


@cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _fill(template: str, parts: tuple[str, ...]) -> str:
    left = iter(parts)
    return re.sub(r"[#*]", lambda _: next(left), template)


def is_unused(official: str) -> bool:
    """Whether an official tensor is known and has no part in single-image segmentation."""
    return official.startswith(UNUSED)


def native_names(official: str) -> tuple[str, ...] | None:
    """Native tensors that hold an official one, or None when the name is unknown."""
    for template, *natives in _ROWS:
        if match := _pattern(template).fullmatch(official):
            return tuple(_fill(native, match.groups()) for native in natives)
    return None


def official_names(native: str) -> tuple[str, ...]:
    """Official tensors that a native one is stored in; the inverse of `native_names`."""
    for official, *natives in _ROWS:
        for template in natives:
            if match := _pattern(template).fullmatch(native):
                if official == POINTS:
                    return tuple(_fill(official, (str(k),)) for k in range(4))
                return (_fill(official, match.groups()),)
    raise KeyError(f"no official name for the native tensor {native!r}")


def _point_row(official: str) -> int | None:
    """The row of the point-embedding table that an official tensor fills, or None for any other tensor."""
    match = _pattern(POINTS).fullmatch(official)
    return int(match[1]) if match else None


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
    folder = EMBEDDED if path is None else Path(path)
    config = read_config(folder, sam2)
    processor = Sa2VAProcessor(config, load_tokenizer(folder))
    try:
        with torch.device("meta"):
            model = Sa2VA(config)
    except Exception as error:  # transformers checks its configurations in many ways
        fault = f"{folder}: no model can be built from config.json and {SAM2_SIDECAR}"
        raise CheckpointError(f"{fault} ({' '.join(str(error).split())}). Copy them again.") from None
    model.leave_out(without)
    state = native_state(model, read_tensors(folder, without), dtype, str(folder))
    model.load_state_dict(state, strict=True, assign=True)
    if model.lm is not None:  # the rotary table is computed, not stored; on the meta device it is still empty
        model.lm.model.rotary_emb = type(model.lm.model.rotary_emb)(config.native_llm())
    model.autocasts = dtype == torch.bfloat16 and torch.device(device).type == "cuda"
    model.image_token_id, model.seg_token_id = processor.image_token_id, processor.seg_token_id
    rows = config.native_llm().vocab_size
    if max(processor.image_token_id, processor.seg_token_id) >= rows:
        raise CheckpointError(f"{folder}: the tokenizer has ids beyond the {rows} rows of embeddings.")
    return model.requires_grad_(False).eval().to(device), processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Builds the checkpoint's Qwen2 tokenizer from vocab.json and merges.txt, or from tokenizer.json alone.

    Only vocabulary, merges and added tokens are read: no code and no pattern of the files is used.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    whole, settings, added = (read_json_object(folder / n) if (folder / n).exists() else {} for n in names)
    needed = () if whole else ("vocab.json", "merges.txt", "tokenizer_config.json")
    if missing := ", ".join(name for name in needed if not (folder / name).exists()):
        raise CheckpointError(f"{folder} lacks the tokenizer files {missing}. Copy them from the source.")
    try:
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
        else:
            vocab, merges = read_json_object(folder / "vocab.json"), _read_merges(folder / "merges.txt")
        tokens = {one["id"]: one for one in whole.get("added_tokens") or ()}
        tokens |= {number: {"content": text, "special": True} for text, number in added.items()}
        tokens |= {int(number): one for number, one in (settings.get("added_tokens_decoder") or {}).items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        decoder = {
            number: AddedToken(one["content"], **{name: one[name] for name in flags if name in one})
            for number, one in sorted(tokens.items())
        }
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, added_tokens_decoder=decoder)
        found = {number: tokenizer.convert_tokens_to_ids(one.content) for number, one in decoder.items()}
    except Exception as error:  # the tokenizers library raises nothing narrower
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        fault = f"{folder}: the tokenizer files cannot be used ({kind}{error})"
        raise CheckpointError(f"{fault}. Copy them again.") from None
    if moved := [number for number, got in found.items() if got != number]:
        fault = f"{folder}: the tokenizer files give token {moved[0]} the number {found[moved[0]]}"
        raise CheckpointError(f"{fault}; they are of different models. Copy them again.")
    return tokenizer


def _read_merges(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise unreadable(file, error) from None
    if lines[0].startswith("version https://git-lfs"):
        raise unreadable(file, ValueError(lines[0]))
    return [line for line in lines if line and not line.startswith("#version")]


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


def read_tensors(folder: Path, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yields official names and tensors of all shards, one at a time; what a mask needs holds numbers."""
    for name, tensor in chain.from_iterable(read_shard(file, without) for file in shard_files(folder)):
        if not is_unused(name):
            check_weight(name, tensor, folder)
        yield name, tensor


def check_weight(name: str, tensor: Tensor, source: Path) -> None:
    """Refuses a tensor with nan, infinity or a value that no trained weight has."""
    if tensor.dtype not in _FLOATS:
        fault = f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{fault}; quantised weights are not read. Give the original, in floats.")
    # The extremes of a tensor with a nan are nan.
    largest = max(abs(float(end)) for end in tensor.aminmax()) if tensor.numel() else 0.0
    if not largest <= LARGEST_WEIGHT:
        found = (
            f"values as large as {largest:.3g}" if math.isfinite(largest) else f"{largest} instead of numbers"
        )
        fault = f"{source}: {name} holds {found}; weights are below {LARGEST_WEIGHT:g}"
        raise CheckpointError(f"{fault}. The file is damaged or its training has failed: take another copy.")


def read_shard(file: Path, without: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yields names and tensors of one safetensors file, but for those whose native name begins so."""
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no dict)
                if not ((without and native_names(name)) or ("",))[0].startswith(without):
                    yield name, shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from None


def native_state(
    model: Sa2VA, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: str = "The checkpoint"
) -> dict[str, Tensor]:
    """Builds the model's state dict from official tensors; the error lists all that do not fit."""
    expected = model.state_dict()
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    unknown = []
    for official, tensor in tensors:
        if is_unused(official):
            continue
        natives = native_names(official)
        if natives is None or not expected.keys() >= set(natives):
            unknown.append(official)
            continue
        parts = tensor.chunk(3) if len(natives) == 3 else [tensor] * len(natives)
        for name, part in zip(natives, parts, strict=False):
            wanted = torch.float32 if name.startswith(("sam.", "text_hidden_fcs.")) else dtype
            found[name][_point_row(official) or 0] = part.to(wanted).contiguous()
    state, wrong = {}, []
    for name, rows in found.items():
        parts = [rows[k] for k in sorted(rows)]
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        got, shape = tuple(state[name].shape), tuple(expected[name].shape)
        if got != shape:
            wrong.append(f"{official_names(name)[0]} {got} (model {name}: {shape})")
    if model.config.is_tied and _EMBEDDING in state and _HEAD in expected:
        state.setdefault(_HEAD, state[_EMBEDDING])
    problems = {"wrong shape": wrong, "unknown": unknown, "missing": sorted(set(expected) - set(state))}
    listed = [f"{len(names)} {kind}: {'; '.join(names[:3])}" for kind, names in problems.items() if names]
    if listed:
        advice = "Check that config.json, sam2_config.json and the shards come from one model."
        raise CheckpointError(f"{source} does not fit its config.json. {' | '.join(listed)}. {advice}")
    return state


def describe_config(config: Sa2VAConfig, processor: Sa2VAProcessor) -> str:
    """One line on the model's shape for logs."""
    vision, llm = (f"{v['num_hidden_layers']}x{v['hidden_size']}" for v in (config.vision, config.llm))
    sam2 = f"{'-'.join(map(str, config.sam2.blocks_per_stage))} at {config.sam2.image_size} px"
    return f"vision {vision}, LM {llm}, SAM2 {sam2}, tile {config.tile_px} px, [SEG] {processor.seg_token_id}"


def official_tensor(official: str, state: dict[str, Tensor]) -> Tensor:
    """Puts one official tensor together from the native state dict."""
    natives, row = native_names(official), _point_row(official)
    if row is not None:
        return state[natives[0]][row : row + 1].contiguous()
    if len(natives) == 3:
        return torch.cat([state[name] for name in natives])
    return state[natives[0]].contiguous()


def save_sa2va(model: Sa2VA, folder: Path) -> None:
    """Writes config.json, the SAM2 side-car and model.safetensors in float32, but no tokenizer."""
    write_json(folder / "config.json", model.config.to_dict())
    write_json(folder / SAM2_SIDECAR, asdict(model.config.sam2))
    state = model.state_dict()
    names = dict.fromkeys(official for native in state for official in official_names(native))
    tensors = {name: official_tensor(name, state).detach().to("cpu", torch.float32) for name in names}
    with atomic_write(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def copy_with_weights(
    source: Path, target: Path, model: Sa2VA, dtype: torch.dtype | None = None
) -> set[torch.dtype]:
    """Copies a checkpoint with the model's weights for its own, in `dtype` or in that of each tensor.

    Returns the kinds of numbers that were written.
    """
    shards = shard_files(source)
    check_room(target.parent, 1.05 * sum(file.stat().st_size for file in shards), "the merged copy")
    state, written = model.state_dict(), set()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*(file.name for file in shards)))
    for file in shards:
        tensors = {}
        for name, original in read_shard(file):
            is_loaded = (native_names(name) or ("",))[0] in state
            new = official_tensor(name, state) if is_loaded else original
            tensors[name] = new.detach().to("cpu", dtype or original.dtype).contiguous()
            written.add(tensors[name].dtype)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    return written
