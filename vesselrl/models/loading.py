"""Official Sa2VA checkpoint folders to a native model and back; strict, safetensors only.

Every tensor in the folder is used, known to be unused (SAM2's video memory), or an error; every native tensor
is filled, or an error. Nothing here runs code from the checkpoint.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from vesselrl.errors import CheckpointError
from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions, read_config, read_json
from vesselrl.models.keymap import is_unused, native_names, point_row
from vesselrl.models.processing import Sa2VAProcessor
from vesselrl.models.sa2va import Sa2VA

EMBEDDED = Path(__file__).parent / "embedded"


def load_sa2va(
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sam2: Sam2Dimensions | None = None,
) -> tuple[Sa2VA, Sa2VAProcessor]:
    """Loads a checkpoint folder; None loads the miniature shipped with the package.

    Args:
        path: folder with config.json, safetensors shards and tokenizer files.
        device: where the model goes.
        dtype: of vision tower, projector and language model; SAM2 and its prompt projection stay float32.
        sam2: SAM2's dimensions, overriding the side-car.

    Returns:
        The model in evaluation mode, without gradients, and its processor.

    Raises:
        CheckpointError: folder, file or tensor missing, broken, unknown or of another shape;
            the message names it.
    """
    folder = EMBEDDED if path is None else Path(path)
    config = read_config(folder, sam2)
    processor = Sa2VAProcessor(config, load_tokenizer(folder))
    with torch.device("meta"):
        model = Sa2VA(config)
    state = native_state(model, read_tensors(folder), dtype, str(folder))
    model.load_state_dict(state, strict=True, assign=True)
    # The rotary table is computed, not stored; on the meta device it is still empty.
    model.lm.model.rotary_emb = type(model.lm.model.rotary_emb)(config.native_llm())
    model.image_token_id, model.seg_token_id = processor.image_token_id, processor.seg_token_id
    rows = model.lm.get_input_embeddings().num_embeddings
    if max(processor.image_token_id, processor.seg_token_id) >= rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids beyond the {rows} rows of the embedding table."
        )
    return model.requires_grad_(False).eval().to(device), processor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, without running its code.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    missing = [
        name for name in ("vocab.json", "merges.txt", "tokenizer_config.json") if not (folder / name).exists()
    ]
    if missing:
        raise CheckpointError(
            f"{folder} lacks the tokenizer files {', '.join(missing)}. Copy them from the source."
        )
    try:
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(
            f"{folder}: the tokenizer files cannot be used ({error}). Copy them from the source again."
        ) from None


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, complete.

    Raises:
        CheckpointError: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no `weight_map` object. Copy it again from the source.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} shards named in {index.name}: "
                f"{', '.join(missing)}."
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no model*.safetensors file. Pickled .bin or .pth weights are not read."
        )
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Official names and tensors of all shards, one at a time."""
    for file in shard_files(folder):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no dict)
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}). It may be truncated: copy it again."
            ) from None


def native_state(
    model: Sa2VA,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    source: str = "The checkpoint",
) -> dict[str, torch.Tensor]:
    """The model's state dict built from official tensors.

    Raises:
        CheckpointError: listing missing, unknown and wrongly shaped tensors.
    """
    expected = model.state_dict()
    state: dict[str, torch.Tensor] = {}
    rows: dict[str, dict[int, torch.Tensor]] = {}
    unknown, wrong = [], []
    for official, tensor in tensors:
        natives = native_names(official)
        if is_unused(official):
            continue
        if natives is None or any(name not in expected for name in natives):
            unknown.append(official)
            continue
        row = point_row(official)
        if row is not None:
            rows.setdefault(natives[0], {})[row] = tensor
            continue
        parts = tensor.chunk(3) if len(natives) == 3 else [tensor] * len(natives)
        for name, part in zip(natives, parts, strict=True):
            if part.shape != expected[name].shape:
                wrong.append(
                    f"{official} {tuple(tensor.shape)} (model {name}: {tuple(expected[name].shape)})"
                )
                continue
            state[name] = _cast(name, part, dtype)
    for name, pieces in rows.items():
        table = torch.cat([pieces[k] for k in sorted(pieces)])
        if table.shape != expected[name].shape:
            wrong.append(f"point embeddings {tuple(table.shape)} (model {tuple(expected[name].shape)})")
        else:
            state[name] = _cast(name, table, dtype)
    _refuse_mismatch(sorted(set(expected) - set(state)), unknown, wrong, source)
    return state


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wanted = torch.float32 if name.startswith(("sam.", "text_hidden_fcs.")) else dtype
    return tensor.to(wanted).contiguous()


def _refuse_mismatch(missing: list[str], unknown: list[str], wrong: list[str], source: str) -> None:
    problems = []
    for label, names in (("wrong shape", wrong), ("unknown", unknown), ("missing", missing)):
        # A tensor of another shape is missing too; naming it once is enough.
        if names and not (label == "missing" and wrong):
            shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{len(names)} {label}: {shown}")
    if problems:
        raise CheckpointError(
            f"{source} does not fit its config.json. {' | '.join(problems)}. "
            "Check that config.json, sam2_config.json and the shards come from one model."
        )


def describe_config(config: Sa2VAConfig, processor: Sa2VAProcessor) -> str:
    """One line on the model's shape for logs."""
    llm, sam2 = config.llm, config.sam2
    return json.dumps(
        {
            "vision": f"{config.vision['num_hidden_layers']}x{config.vision['hidden_size']}",
            "llm": f"{llm['num_hidden_layers']}x{llm['hidden_size']}",
            "sam2": f"{'-'.join(map(str, sam2.blocks_per_stage))} at {sam2.image_size} px",
            "tile_px": config.tile_px,
            "seg_token_id": processor.seg_token_id,
        }
    )
