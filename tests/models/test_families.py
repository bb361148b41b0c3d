"""Every family from a small random checkpoint in its official layout, made from transformers' own classes."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.convert_slow_tokenizer import import_protobuf

from vesselrl.errors import CheckpointError
from vesselrl.models.checkpoint import copy_with_weights, load_sa2va
from vesselrl.models.config import Sa2VAConfig
from vesselrl.models.lora import LoraPreset, attach_lora, save_adapter
from vesselrl.models.miniature import DEBUG_CONFIG, random_sa2va, write_miniature

HIDDEN, LAYERS, ROWS = 48, 2, 640
TEXT = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": ROWS}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 4096}
SCALING = {"type": "default", "rope_type": "default", "mrope_section": [2, 2, 2]}
MROPE = {"rope_scaling": SCALING, "rope_theta": 1e4}
LOOK = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": HIDDEN}
LOOK |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN25 = LOOK | {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
QWEN3 = LOOK | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
TOWER_6B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
SAM = "grounding_encoder.sam2_model."
QWEN_VL_TOKENS = {"<img>": "<|vision_start|>", "<IMG_CONTEXT>": "<|image_pad|>", "</img>": "<|vision_end|>"}
SPECIAL = "<|im_start|> <|im_end|> <img> </img> <IMG_CONTEXT> [SEG] <p> </p> <vp> </vp>".split()


class Case(NamedTuple):
    """One family: its kind for vesselrl, and the name of transformers' own classes."""

    kind: str
    plain: str
    text: Mapping = MappingProxyType({})  # further fields of its language model
    vision: Mapping = MappingProxyType({})
    template: str = "qwen_chat"
    decoders: int = 1

    @property
    def is_whole(self) -> bool:
        return self.kind.endswith("_vl")

    @property
    def model(self) -> type[transformers.PreTrainedModel]:
        task = "ForConditionalGeneration" if self.is_whole else "ForCausalLM"
        return getattr(transformers, self.plain + task)

    def config(self) -> transformers.PretrainedConfig:
        config, text = getattr(transformers, f"{self.plain}Config"), TEXT | {**self.text}
        whole = {"text_config": text, "vision_config": {**self.vision}, "tie_word_embeddings": False}
        return config(**(whole if self.is_whole else text))


QWEN2, INTERNLM2 = "Qwen2ForCausalLM", "InternLM2ForCausalLM"
CASES = {
    "Qwen2": Case(QWEN2, "Qwen2"),
    "Qwen2 in Phi3's words": Case(QWEN2, "Qwen2", template="phi3-chat"),
    "Qwen3": Case("Qwen3ForCausalLM", "Qwen3", {"head_dim": 16}),
    "InternLM2": Case(INTERNLM2, "Llama", template="internlm2_chat"),
    "InternLM2 with biases, 6B tower": Case(
        INTERNLM2, "Llama", {"attention_bias": True}, TOWER_6B, "internlm2_chat"
    ),
    "Sa2VA-i": Case(QWEN2, "Qwen2", decoders=2),
    "Qwen2.5-VL": Case("qwen2_5_vl", "Qwen2_5_VL", MROPE, QWEN25),
    "Qwen3-VL": Case("qwen3_vl", "Qwen3VL", MROPE | {"head_dim": 12}, QWEN3),
}


def internlm2_tensors(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's tensors as InternLM2 stores them, head by head: two heads of keys, each with two of queries."""
    found = {"model.tok_embeddings.weight": llama["model.embed_tokens.weight"]}
    found |= {"output.weight": llama["lm_head.weight"], "model.norm.weight": llama["model.norm.weight"]}
    for layer in range(LAYERS):
        at, dim = f"model.layers.{layer}.", HIDDEN // 4
        for end in ("weight", "bias"):
            if f"{at}self_attn.q_proj.{end}" in llama:
                q, k, v = (llama[f"{at}self_attn.{part}_proj.{end}"].split(dim) for part in "qkv")
                heads = [q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]]
                found[f"{at}attention.wqkv.{end}"] = torch.cat(heads)
                found[f"{at}attention.wo.{end}"] = llama[f"{at}self_attn.o_proj.{end}"]
        for theirs, mine in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            found[f"{at}feed_forward.{theirs}.weight"] = llama[f"{at}mlp.{mine}_proj.weight"]
        found[f"{at}attention_norm.weight"] = llama[f"{at}input_layernorm.weight"]
        found[f"{at}ffn_norm.weight"] = llama[f"{at}post_attention_layernorm.weight"]
    return found


def write_pieces(folder: Path) -> None:
    """InternLM2's tokenizer: a SentencePiece model of single letters and bytes; the rest is added tokens."""
    model = import_protobuf().ModelProto()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), "▁", *"Sure,.onti", "▁S", "Su"]
    for number, name in enumerate(names):
        model.pieces.add(piece=name, score=-float(number))
    model.trainer_spec.model_type = 2
    model.normalizer_spec.add_dummy_prefix = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    tokens = {len(names) + k: {"content": token, "special": True} for k, token in enumerate(SPECIAL)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()


def text_section(case: Case, config: object) -> dict:
    """The language model's part of config.json in the words of its official class."""
    text = (config.text_config if case.is_whole else config).to_dict()
    if "InternLM2" in case.kind:
        text |= {"bias": text.pop("attention_bias"), "model_type": "internlm2"}
    return text | {"architectures": [case.kind]}


def make_checkpoint(folder: Path, case: Case) -> transformers.PreTrainedModel:
    """Writes a checkpoint in the official layout; returns the plain class with the same values."""
    torch.manual_seed(0)
    plain = case.model(case.config()).eval()
    with torch.no_grad():
        for name, value in plain.state_dict().items():
            if "norm" in name or "bias" in name:
                value.add_(0.1 * torch.randn_like(value))
    is_whole = case.is_whole
    vision = {**case.vision} if is_whole else DEBUG_CONFIG.vision | {**case.vision}
    llm = text_section(case, plain.config)
    config = Sa2VAConfig(vision, llm, DEBUG_CONFIG.sam2, 56, kind=case.kind)
    write_miniature(folder, random_sa2va(1, config))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"template": case.template}))
    if "InternLM2" in case.kind:
        write_pieces(folder)
    for file in folder.glob("*token*.json") if is_whole else ():
        text = file.read_text()
        for ours, theirs in QWEN_VL_TOKENS.items():
            text = text.replace(f'"{ours}"', f'"{theirs}"')
        file.write_text(text)
    text = internlm2_tensors(plain.state_dict()) if "InternLM2" in case.kind else plain.state_dict()
    prefix = "model." if is_whole else "language_model."
    tensors = load_file(folder / "model.safetensors")
    official = {name for name in tensors if name.startswith(prefix)}
    assert official == {prefix + name for name in text}  # the names of the official layout
    tensors |= {prefix + name: value.clone() for name, value in text.items()}
    tensors[SAM + "maskmem_tpos_enc"] = torch.randn(7, 1, 1, 8)
    if case.decoders == 2:
        decoder = {n: t for n, t in tensors.items() if ".sam_mask_decoder." in n}
        tensors |= {n.replace("decoder.", "decoder_modified.", 1): t for n, t in decoder.items()}
        tensors |= {name: torch.randn_like(tensor) for name, tensor in decoder.items()}
    tensors = {n: t.bfloat16() if "mlp1" in n else t for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return plain


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("family") / "model"
    return folder, CASES[request.param], make_checkpoint(folder, CASES[request.param])


IMAGES = [np.random.default_rng(k).integers(0, 255, (60 + 8 * k, 64, 3), dtype=np.uint8) for k in range(2)]


@torch.no_grad()
def test_what_is_loaded_is_exported_bit_for_bit(made: tuple, tmp_path: Path) -> None:
    folder, case, _ = made
    model, _ = load_sa2va(folder)
    copy_with_weights(folder, tmp_path / "copy", model, set(model.state_dict()))  # all through the key map
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "copy"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    again = load_sa2va(tmp_path / "copy")[0].state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    decoder = "sam_mask_decoder_modified" if case.decoders == 2 else "sam_mask_decoder"
    mine = model.sam.mask_decoder.iou_token.weight
    assert torch.equal(mine, before[f"{SAM}{decoder}.iou_token.weight"])


@torch.no_grad()
def test_the_language_model_is_transformers_own(made: tuple) -> None:
    folder, case, plain = made
    model, processor = load_sa2va(folder)
    assert type(model.lm) is case.model
    inputs = processor([IMAGES[0]])
    if case.is_whole:
        plain.config.image_token_id = processor.image_token_id
        given = {"input_ids": inputs.input_ids, "pixel_values": inputs.tiles, "image_grid_thw": inputs.grids}
        given["mm_token_type_ids"] = (inputs.input_ids == processor.image_token_id).int()
    else:
        given = {"input_ids": torch.arange(20)[None] % 7}
    assert torch.equal(model.lm(**given).logits, plain(**given).logits)


class Force(transformers.LogitsProcessor):
    """Makes `generate` write given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0
        return forced


@torch.no_grad()
def test_the_state_at_seg_is_that_of_generate(made: tuple) -> None:
    """Also in a batch of two sizes, where the shorter text is padded."""
    folder, _, _ = made
    model, processor = load_sa2va(folder)
    states = model.seg_states(processor(IMAGES))
    for image, state in zip(IMAGES, states, strict=True):
        inputs = processor([image])
        ids = inputs.input_ids
        suffix = processor.tokenizer("Sure, [SEG].", add_special_tokens=False)["input_ids"]
        start = next(k for k in range(ids.shape[1]) if ids[0, k : k + len(suffix)].tolist() == suffix)
        prompt, answer = ids[:, :start], ids[0, start:].tolist()
        is_image = prompt == model.image_token_id
        if model.config.family.is_whole:
            given = {"input_ids": prompt, "pixel_values": inputs.tiles, "image_grid_thw": inputs.grids}
            given["mm_token_type_ids"] = is_image.int()
        else:
            given = {"inputs_embeds": model.embed(prompt, is_image, inputs.tiles)}
        done = model.lm.generate(
            **given, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer), do_sample=False,
            eos_token_id=None, pad_token_id=0, logits_processor=[Force(answer)],
            return_dict_in_generate=True, output_hidden_states=True,
        )  # fmt: skip
        # Step k has the state of the token that step k - 1 wrote.
        steps = torch.cat([step[-1][0, -1:] for step in done.hidden_states[1:]])
        expected = steps[answer.index(processor.seg_token_id)]
        torch.testing.assert_close(state[0], expected, rtol=0, atol=1e-5)


def test_prompts_are_the_published_ones(made: tuple) -> None:
    folder, case, _ = made
    _, processor = load_sa2va(folder)
    inputs = processor([IMAGES[0]], "Where?", "Sure, [SEG].")
    text = processor.tokenizer.decode(inputs.input_ids[0])
    start, token, end = processor.config.family.image_text
    image = start + token * text.count(token) + end
    if case.template == "phi3-chat":
        expected = f"<|user|>\n{image}\nWhere?<|end|>\n<|assistant|>\nSure, [SEG].<|end|>"
    else:
        chat = f"<|im_start|>user\n{image}\nWhere?<|im_end|>\n<|im_start|>assistant\nSure, [SEG].<|im_end|>"
        expected = "<s>" * ("InternLM2" in case.kind) + chat
        if "InternLM2" in case.kind:
            pieces = processor.tokenizer.tokenize("Sure é[SEG]")
            assert pieces == ["Su", "r", "e", "▁", "<0xC3>", "<0xA9>", "[SEG]"]
    assert text == expected
    assert text.count(token) == (4 if not case.is_whole else int(inputs.grids.prod()) // 4)


@torch.no_grad()
def test_an_adapter_is_plain_peft_and_merges_into_the_official_layout(made: tuple, tmp_path: Path) -> None:
    folder, case, _ = made
    model, processor = load_sa2va(folder)
    inputs = processor(IMAGES[:1])
    scope = ("language_model", "projector", "mask_decoder")
    adapted = attach_lora(model, scope, LoraPreset(2, 4, 0.0, ("q_proj", "down_proj")))
    in_language = [name for name in adapted.base_model.targeted_module_names if name.startswith("lm.")]
    assert len(in_language) == 2 * LAYERS
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(0, 0.5, generator=generator)
    base, expected = load_sa2va(folder)[0](inputs)[0], adapted.get_base_model()(inputs)[0]
    assert float((base - expected).abs().max()) > 1e-3
    save_adapter(adapted, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(load_sa2va(folder)[0], str(tmp_path / "adapter"))
    torch.testing.assert_close(plain.base_model.model(inputs)[0], expected, rtol=1e-4, atol=1e-5)
    targets = {f"{name}.weight" for name in adapted.base_model.targeted_module_names}
    copy_with_weights(folder, tmp_path / "merged", adapted.merge_and_unload(), targets)
    merged = load_sa2va(tmp_path / "merged")[0](inputs)[0]
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "merged"))
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {official for target in targets for official in model.keys.officials(target)}
    kept = ("maskmem_tpos_enc", "sam_mask_decoder.") if case.decoders == 2 else ("maskmem_tpos_enc",)
    assert not [name for name in changed if name.startswith(tuple(SAM + part for part in kept))]


def test_what_no_adapter_touches_keeps_bits_that_the_model_does_not_hold(folder, tmp_path) -> None:
    third = torch.full((1, 1, 32), 1 / 3, dtype=torch.float64)  # the model has 24 of its 53 bits
    rewrite(folder, lambda tensors: tensors | {"vision_model.embeddings.class_embedding": third})
    copy_with_weights(folder, tmp_path / "copy", load_sa2va(folder)[0], {"text_hidden_fcs.0.weight"})
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert torch.equal(copied["vision_model.embeddings.class_embedding"], third)


# ---- What is no Sa2VA of these, or not the whole of one


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def reconfigure(folder: Path, section: str | None = None, **fields: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (values[section] if section else values).update(fields)
    (folder / "config.json").write_text(json.dumps(values))


REFUSED = {
    "SAM3": (lambda f: reconfigure(f, architectures=["Sa2VAChatModelSAM3"]), "SAM3 variant .* 1008 px"),
    "SAM3 by its tensors": (
        lambda f: rewrite(f, lambda t: t | {"grounding_encoder.sam3_model.x": torch.zeros(1)}), "SAM3"),
    "LLaVA": (lambda f: reconfigure(f, architectures=["Sa2VAChatModelLlava"]), "LLAVA .*no single image"),
    "Phi3": (lambda f: reconfigure(f, "llm_config", architectures=["Phi3ForCausalLM"]), "model is Phi3, "),
    "another class": (lambda f: reconfigure(f, "llm_config", architectures=["GemmaForCausalLM"]),
                      "names the language model 'GemmaForCausalLM'; supported are Qwen2ForCausalLM, "),
    "another template": (lambda f: reconfigure(f, template="llama3_chat"), "template = 'llama3_chat'; "),
    "SAMTok, or a base model": (
        lambda f: rewrite(f, lambda t: {n: v for n, v in t.items() if not n.startswith("grounding")}),
        r"\d+ missing: grounding_encoder.*alone, or SAMTok, is no Sa2VA"),
    "the first half": (lambda f: rewrite(f, lambda t: dict([*t.items()][: len(t) // 2])),
                       r"\d+ missing: .*Only a part was copied \(\d+ tensors fit\)"),
    "config of another family": (
        lambda f: reconfigure(f, "llm_config", architectures=["InternLM2ForCausalLM"]),
        r"20 missing: language_model.output.*26 unknown: .*the tensors of another family"),
    "config of another size": (lambda f: reconfigure(f, "llm_config", intermediate_size=128),
                               r"6 wrong shape: language_model.*sizes are of another model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_counted_and_named_with_advice_for_the_case(folder: Path, kind: str) -> None:
    spoil, message = REFUSED[kind]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_sa2va(folder)


def test_a_name_on_hugging_face_is_fetched_without_code_or_pickles(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        target = Path(shutil.copytree(tiny_checkpoint, tmp_path / f"{len(asked)}" / "0a1b2c"))
        files = "model.safetensors x.json merges.txt tokenizer.model".split()
        others = "modeling.py a.bin b.pth c.pt d.pkl".split()
        assert [*filter_repo_objects(files + others, allow_patterns=allow_patterns)] == files
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    for given in ("ByteDance/Sa2VA-1B", "ByteDance/Sa2VA-1B@0a1b2c", "ByteDance/Sa2VA-1B@refs/pr/3"):
        load_sa2va(given)
    assert asked == [("ByteDance/Sa2VA-1B", revision) for revision in (None, "0a1b2c", "refs/pr/3")]
    # Refused before gigabytes come.
    for name in ("ByteDance/Sa2VA-Qwen3-VL-4B-SAM3", "org/Qwen3-VL-4B-SAMTok"):
        with pytest.raises(CheckpointError, match="variant of Sa2VA"):
            load_sa2va(name)
    assert len(asked) == 3
    monkeypatch.undo()
    message = "x/y@v1 is no folder here, and Hugging Face gives no such model .* or run `hf download x/y`"
    with pytest.raises(CheckpointError, match=f"{message} on a"):  # the tests are offline
        load_sa2va("x/y@v1")
    with pytest.raises(CheckpointError, match="does not exist; give --model_path"):
        load_sa2va(tmp_path / "nowhere")
