"""A random Sa2VA small enough for tests: same classes, same file layout, same geometry as the published ones.

Those see a 512-px image as one 448-px tile and, for SAM2, at twice its side. The embedded miniature keeps
these ratios for 256-px images, the debug shape below for 64-px images.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vesselrl.experiment.config import RANDOM_MODEL
from vesselrl.experiment.run_folder import write_json, write_text
from vesselrl.models.checkpoint import checkpoint_folder, save_sa2va
from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions
from vesselrl.models.sa2va import Sa2VA

_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> "
    "<box> </box> [SEG] <p> </p> <vp> </vp>"
).split()
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_PIXELS = {"image_size": 56, "patch_size": 14, "initializer_factor": 0.1}
_LLM = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT = {"vocab_size": 256 + len(_SPECIAL), "max_position_embeddings": 4096, "rope_theta": 1e6}
# The smallest shape with every kind of layer.
DEBUG_CONFIG = Sa2VAConfig(
    vision={"architectures": ["InternVisionModel"]} | _VISION | _PIXELS,
    llm={"architectures": ["Qwen2ForCausalLM"]} | _LLM | {"intermediate_size": 96} | _TEXT,
    sam2=Sam2Dimensions(
        image_size=128, embed_dim_per_stage=(8, 16, 32, 64), blocks_per_stage=(1, 1, 2, 1),
        num_attention_heads_per_stage=(1, 2, 4, 8), window_size_per_stage=(8, 4, 4, 4),
        global_attention_blocks=(3,), background_size=(4, 4), hidden_size=32, decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    ),
    tile_px=56,
)  # fmt: skip


def random_sa2va(seed: int = 0, config: Sa2VAConfig = DEBUG_CONFIG) -> Sa2VA:
    """A model with random weights, in the state that a first training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sa2VA(config)
        sam, tokens = model.sam, [model.sam.vision_encoder.backbone.pos_embed, model.sam.no_memory_embedding]
        if model.vision is not None:
            tokens += [model.vision.embeddings.cls_token, model.vision.embeddings.position_embeddings]
        for parameter in tokens:
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    model.image_token_id, model.seg_token_id = (256 + _SPECIAL.index(t) for t in ("<IMG_CONTEXT>", "[SEG]"))
    # One positional matrix in two places, as in the official checkpoint.
    shared = sam.shared_image_embedding.positional_embedding
    sam.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    return model


def write_miniature(folder: Path, model: Sa2VA) -> None:
    """Writes model and tokenizer as a folder in the official layout."""
    save_sa2va(model, folder)
    write_tokenizer(folder)


@contextmanager
def base_checkpoint(base: str | Path | None, seed: int | None) -> Iterator[Path]:
    """The folder of a base model; for `random` one with the debug miniature, while a `with` block lasts."""
    if base != RANDOM_MODEL or seed is None:
        yield checkpoint_folder(base)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows removes no mapped file
        write_miniature(Path(folder), random_sa2va(seed))
        yield Path(folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and Sa2VA's special tokens, in Qwen2's file layout."""
    ids = {token: 256 + index for index, token in enumerate(_SPECIAL)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(index): {"content": token, **flags} for token, index in ids.items()}
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    names = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "add_prefix_space": False}
    characters = bytes_to_unicode()
    write_json(folder / "vocab.json", {characters[byte]: byte for byte in range(256)})
    write_text(folder / "merges.txt", "#version: 0.2\n")
    write_json(folder / "added_tokens.json", ids)
    write_json(folder / "tokenizer_config.json", names | special)
    write_json(folder / "special_tokens_map.json", special)
