"""Official and native tensor names, folders as others save them, and damaged ones, which are named."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from vesselrl.errors import CheckpointError
from vesselrl.models.checkpoint import LARGEST_WEIGHT, load_sa2va, native_state, read_tensors
from vesselrl.models.miniature import random_sa2va
from vesselrl.models.processing import load_tokenizer
from vesselrl.models.sa2va import Sa2VA

LOST = "text_hidden_fcs.2.bias"
QKV = "vision_model.encoder.layers.0.attn.qkv.weight"
POINT = "grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.2.weight"


def test_all_names_and_shapes_of_the_8b_checkpoint(shared_folder: Path, model_8b: Sa2VA) -> None:
    table = json.loads((shared_folder / "design" / "keymap_internvl3_8b.json").read_text())
    keys = model_8b.keys
    official = {name: torch.empty(row["shape"], device="meta") for name, row in table.items()}
    state = native_state(model_8b, official.items(), torch.bfloat16)  # raises on any mismatch
    shapes = {name: tensor.shape for name, tensor in model_8b.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert len(official) == 1589
    assert sum(map(keys.is_unused, official)) == sum(row["native"] is None for row in table.values()) == 157
    for name, row in table.items():
        if row["native"] is None:
            assert keys.is_unused(name), name
        elif row["native"]:  # the table left one name out
            assert sorted(keys.natives(name)) == sorted(row["native"]), name
        else:
            assert name.endswith("sam_prompt_encoder.not_a_point_embed.weight")


def test_parameter_counts_of_the_8b_model(model_8b: Sa2VA) -> None:
    """Counts of the official model per part; of SAM2 those that single images use."""
    parts = ("vision", "projector", "lm", "text_hidden_fcs", "sam")
    counts = {name: sum(p.numel() for p in getattr(model_8b, name).parameters()) for name in parts}
    expected = (304_012_288, 27_540_480, 7_612_856_832, 13_766_400, 224_430_130 - 7_505_265)
    assert counts == dict(zip(parts, expected, strict=True))


def test_official_names_invert_native_names() -> None:
    model = random_sa2va()
    for native in model.state_dict():
        for official in model.keys.officials(native):
            assert native in model.keys.natives(official), (native, official)
    assert model.keys.natives("optimizer.state") is None
    with pytest.raises(KeyError, match="no official name"):
        model.keys.officials("nonsense.weight")


MISMATCHES = [
    (LOST, None, f"1 missing: {LOST}"),
    (POINT, None, r"1 wrong shape: .*point_embeddings\.0\.weight \(3, 32\)"),
    ("extra.weight", torch.zeros(1), r"1 unknown: extra\.weight"),
    (LOST, torch.zeros(3), r"1 wrong shape: text_hidden_fcs\.2\.bias \(3,\)"),
    (QKV, torch.zeros(9, 32), rf"3 wrong shape: {QKV} \(3, 32\)"),
    (QKV, torch.zeros(2, 32), rf"1 missing: {QKV} \| 2 wrong shape: {QKV} \(1, 32\).*"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), MISMATCHES)
def test_mismatches_are_listed(tiny_checkpoint: Path, name: str, tensor: object, message: str) -> None:
    tensors = dict(read_tensors(tiny_checkpoint)) | {name: tensor}
    given = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    with pytest.raises(CheckpointError, match=message):
        native_state(random_sa2va(), given, torch.float32)


# ---- Folders as other programs save them give the same masks


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
TEXTS = ("<img><IMG_CONTEXT></img>Sure, [SEG].<|im_end|>", "can't  \u8840\u7ba1 \u00bd \r\n\n 123 [SEG][SEG]")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@torch.inference_mode()
def mask_logits(folder: Path) -> torch.Tensor:
    model, processor = load_sa2va(folder)
    return model(processor([np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)]))[0]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> torch.Tensor:
    return mask_logits(tiny_checkpoint)


def change_config(folder: Path, section: str | None = None, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **changed: object) -> None:
    """Replaces tensors of model.safetensors; `None` removes one."""
    tensors = load_file(folder / "model.safetensors") | changed
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("section", ["llm_config", None])
def test_tied_embeddings_need_no_head(folder: Path, expected: torch.Tensor, section: str | None) -> None:
    change_tensors(folder, **{HEAD: None})
    with pytest.raises(CheckpointError, match=rf"1 missing: {HEAD}"):
        load_sa2va(folder)
    change_config(folder, section, tie_word_embeddings=True)
    assert torch.equal(mask_logits(folder), expected)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    assert torch.equal(load_sa2va(folder)[0].lm.lm_head.weight, embedding)


@pytest.mark.parametrize("alone", [False, True])
def test_a_tokenizer_in_one_file_gives_the_same_ids(folder: Path, expected, alone: bool) -> None:
    names = "vocab.json merges.txt added_tokens.json special_tokens_map.json tokenizer_config.json".split()
    official = Qwen2Tokenizer.from_pretrained(folder)
    found = [load_tokenizer(folder)(text)["input_ids"] for text in TEXTS]
    assert found == [official(text)["input_ids"] for text in TEXTS]
    for name in names:
        (folder / name).unlink()
    official.save_pretrained(folder)
    # A pattern that would take years on a long word: patterns of files are never used.
    whole = json.loads((folder / "tokenizer.json").read_text())
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    whole["pre_tokenizer"] = slow
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    if alone:
        (folder / "tokenizer_config.json").unlink()
    found = load_tokenizer(folder)
    assert [found(text)["input_ids"] for text in TEXTS] == [official(text)["input_ids"] for text in TEXTS]
    assert torch.equal(mask_logits(folder), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_2", "_attn_implementation_autoset": True},
        {"rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        {"architectures": None, "model_type": "qwen2"},
        {"torch_dtype": "bfloat16", "num_beams": "many", "use_cache": "yes", "pruned_heads": 3},
    ],
)
def test_fields_of_resaved_configurations(folder: Path, expected: torch.Tensor, fields: dict) -> None:
    change_config(folder, "llm_config", **fields)
    change_config(folder, "vision_config", use_flash_attn=True, _attn_implementation="flash_attention_2")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert torch.equal(mask_logits(folder), expected)


# ---- What cannot be right is refused in words


def test_weights_of_real_models_are_in_range_and_flipped_exponents_are_not(folder: Path) -> None:
    """400 is about the largest published one, a bias of Qwen2's keys."""
    bias = load_file(folder / "model.safetensors")[LOST]
    for value in (400.0, -LARGEST_WEIGHT):
        bias[1] = value
        change_tensors(folder, **{LOST: bias})
        load_sa2va(folder)
    for bits, dtype, integer in ((30, torch.float32, torch.int32), (14, torch.bfloat16, torch.int16)):
        small = torch.full((32,), 0.02, dtype=dtype)
        small.view(integer)[5] ^= 1 << bits
        change_tensors(folder, **{LOST: small})
        with pytest.raises(CheckpointError, match=rf"{LOST} holds values as large as 6\.\d+e\+36"):
            load_sa2va(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_single_value_that_no_weight_has_is_refused(folder: Path, value: float) -> None:
    weight = load_file(folder / "model.safetensors")[EMBEDDING]
    weight[3, 5] = value
    change_tensors(folder, **{EMBEDDING: weight})
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING} holds "):
        load_sa2va(folder)
    change_tensors(folder, **{EMBEDDING: torch.ones(weight.shape, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING} is int8; quantised"):
        load_sa2va(folder)


def point_index_to(name: object) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))


def config_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text)


def fields(section: str | None = None, **values: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, section, **values)


REFUSED = {
    "shard is a pointer": (lambda f: (f / "model.safetensors").write_bytes(LFS), "pointer.*git lfs pull"),
    "config is a pointer": (lambda f: (f / "config.json").write_bytes(LFS), "config.json is only a Git LFS"),
    "merges are a pointer": (lambda f: (f / "merges.txt").write_bytes(LFS), "merges.txt is only a Git LFS"),
    "index leaves": (point_index_to("../x.safetensors"), "names '../x.safetensors', which is no file"),
    "index is absolute": (point_index_to("/etc/passwd"), "which is no file of this folder"),
    "index of parents": (point_index_to(".."), "lacks 1 of 1 shards"),
    "index of numbers": (point_index_to(3), "names 3, which is no file"),
    "index of lists": (point_index_to(["a"]), "which is no file of this folder"),
    "deep": (config_text('{"a":' * 10**5 + "1" + "}" * 10**5), "nested too deep"),
    "long number": (config_text('{"a":' + "9" * 5000 + "}"), "is not valid JSON"),
    "deep tokenizer": (lambda f: (f / "vocab.json").write_text("[" * 10**5), "vocab.json.*nested too deep"),
    "layers for ever": (fields("llm_config", num_hidden_layers=10**9), "whole numbers for num_hidden_layers"),
    "layers below zero": (fields("vision_config", num_hidden_layers=-1), "needs whole numbers for"),
    "theta is a word": (fields("llm_config", rope_theta="large"), "rope_theta = 'large'; numbers"),
    "theta is nan": (fields("llm_config", rope_theta=float("nan")), "rope_theta = nan"),
    "large epsilon": (fields("llm_config", rms_norm_eps=1e9), "rms_norm_eps = 10000"),
    "scaling is a list": (fields("llm_config", rope_scaling=[2]), "rope_scaling = .2.; objects"),
    "scaling of unknown kind": (fields("llm_config", rope_scaling={"rope_type": "x"}), "no model can be"),
    "unknown activation": (fields("llm_config", hidden_act="x"), "no model can be built"),
    "unknown norm": (fields("vision_config", norm_type="x"), "no model can be built"),
    "odd layer types": (fields("llm_config", layer_types=[1]), "no model can be built"),
    "heads do not divide": (fields("llm_config", num_key_value_heads=3), "does not fit|no model"),
    "class is a number": (fields("llm_config", architectures=5), "names the language model 5"),
    "another model": (fields("llm_config", architectures=None, model_type="phi3"), "names the language"),
    "tile is a word": (fields(force_image_size="448"), "force_image_size = '448'"),
    "huge tile": (fields(force_image_size=56000), "force_image_size = 56000"),
    "ratio is a list": (fields(downsample_ratio=[1]), r"downsample_ratio = \[1\]"),
    "ratio is nan": (fields(downsample_ratio=float("nan")), "downsample_ratio = nan"),
    "token numbers": (
        lambda f: (f / "added_tokens.json").write_text('{"[SEG]": 99999}'), "cannot be used|token 99999"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_named_at_once(folder: Path, kind: str) -> None:
    spoil, message = REFUSED[kind]
    spoil(folder)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        load_sa2va(folder)
    assert time.monotonic() - begun < 10
