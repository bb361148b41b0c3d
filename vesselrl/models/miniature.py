"""A Sa2VA small enough for a laptop: same classes, same file layout, the user's geometry at a smaller size.

The user's model sees a 512-px image as one 448-px tile and, for SAM2, at twice its side with a mask grid of
half of it. The miniature keeps these ratios for 256-px images: one 224-px tile, SAM2 input 512,
mask grid 128.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vesselrl.experiment.run_folder import write_json
from vesselrl.models.config import Sa2VAConfig, Sam2Dimensions
from vesselrl.models.export import save_sa2va
from vesselrl.models.sa2va import Sa2VA

_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
    "<ref>", "</ref>", "<box>", "</box>", "[SEG]", "<p>", "</p>", "<vp>", "</vp>",
)  # fmt: skip

EMBEDDED_SAM2 = Sam2Dimensions(
    image_size=512,
    embed_dim_per_stage=(32, 64, 96, 128),
    blocks_per_stage=(2, 2, 3, 1),
    num_attention_heads_per_stage=(1, 2, 3, 4),
    window_size_per_stage=(8, 4, 8, 8),
    global_attention_blocks=(5,),
    background_size=(8, 8),
    hidden_size=96,
    decoder_mlp_dim=256,
    iou_head_hidden_dim=64,
)
# For tests and the debug preset: the smallest shape with every kind of layer, for 64-px images.
DEBUG_SAM2 = Sam2Dimensions(
    image_size=128,
    embed_dim_per_stage=(8, 16, 32, 64),
    blocks_per_stage=(1, 1, 2, 1),
    num_attention_heads_per_stage=(1, 2, 4, 8),
    window_size_per_stage=(8, 4, 4, 4),
    global_attention_blocks=(3,),
    background_size=(4, 4),
    hidden_size=32,
    decoder_mlp_dim=32,
    iou_head_hidden_dim=16,
)


def miniature_config(sam2: Sam2Dimensions = EMBEDDED_SAM2) -> Sa2VAConfig:
    """Vision tower 2 x 64 and language model 2 x 96 around a given SAM2; half of that for the debug shape."""
    width = 64 if sam2.image_size >= 512 else 32
    tile_px = sam2.image_size * 7 // 16  # 224 for SAM2 input 512, as 448 for 1024
    vision = {
        "architectures": ["InternVisionModel"],
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "image_size": tile_px,
        "patch_size": 14,
        "num_channels": 3,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "initializer_factor": 0.1,
    }
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": width * 3 // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 3 * width,
        "vocab_size": 256 + len(_SPECIAL),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
    }
    return Sa2VAConfig(vision, llm, sam2, tile_px)


def random_sa2va(config: Sa2VAConfig, seed: int = 0) -> Sa2VA:
    """A model with random weights, in the state that a first training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sa2VA(config)
        for parameter in (model.sam.vision_encoder.backbone.pos_embed, model.sam.no_memory_embedding):
            torch.nn.init.trunc_normal_(parameter, std=0.02)
        for parameter in (model.vision.embeddings.cls_token, model.vision.embeddings.position_embeddings):
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    model.image_token_id, model.seg_token_id = (256 + _SPECIAL.index(t) for t in ("<IMG_CONTEXT>", "[SEG]"))
    # One positional matrix in two places, as in the official checkpoint.
    model.sam.prompt_encoder.shared_embedding.positional_embedding.copy_(
        model.sam.shared_image_embedding.positional_embedding
    )
    return model


def write_miniature(folder: Path, config: Sa2VAConfig, model: Sa2VA) -> None:
    """Writes model and tokenizer as a folder in the official layout."""
    save_sa2va(model, folder)
    write_tokenizer(folder)


@contextmanager
def random_checkpoint(seed: int) -> Iterator[Path]:
    """A folder with the random debug miniature of this seed, for the length of a `with` block."""
    with tempfile.TemporaryDirectory() as folder:
        config = miniature_config(DEBUG_SAM2)
        write_miniature(Path(folder), config, random_sa2va(config, seed))
        yield Path(folder)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and Sa2VA's special tokens, in Qwen2's file layout."""
    vocabulary = {character: index for index, character in enumerate(_byte_characters())}
    ids = {token: 256 + index for index, token in enumerate(_SPECIAL)}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", ids)
    decoder = {
        str(index): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for token, index in ids.items()
    }  # fmt: skip
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": decoder,
            "add_prefix_space": False,
            **special,
        },
    )
    write_json(folder / "special_tokens_map.json", special)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE vocabularies, by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + k) for k, byte in enumerate(rest)}
    return [table[byte] for byte in range(256)]
