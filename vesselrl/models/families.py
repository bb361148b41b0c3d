"""The families of Sa2VA: which language model, which tensor names, what stands around image and question.

A family is a row of `FAMILIES`; the state at [SEG], after the final norm, SAM2 and all else are shared. Names
are mapped in both directions by one table, so that what is loaded can be written back bit for bit.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from vesselrl.errors import CheckpointError

_TABLES = tomllib.loads(resources.files("vesselrl.models").joinpath("names.toml").read_text("utf-8"))
_SAM = "grounding_encoder.sam2_model."
_POINTS = _SAM + "sam_prompt_encoder.point_embeddings.#.weight"
# SAM2's video memory: part of every official checkpoint, never used for a single image.
_UNUSED = tuple(
    _SAM + name
    for name in "memory_attention. memory_encoder. maskmem_tpos_enc no_mem_pos_enc no_obj_ptr obj_ptr_proj. "
    "mask_downsample.".split()
)


class Family(NamedTuple):
    """What differs between the families; `is_whole`: vision tower and projector are inside the class."""

    config: type[transformers.PretrainedConfig]
    language_model: type[transformers.PreTrainedModel]
    names: str = "plain"  # tables of its tensors' names, beside the shared ones
    image_text: tuple[str, str, str] = ("<img>", "<IMG_CONTEXT>", "</img>")
    has_bos: bool = False  # `<s>` stands before the prompt
    is_whole: bool = False


_LOOK = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_QWEN_VL = {"names": "qwen_vl", "image_text": _LOOK, "is_whole": True}
# By the class in `llm_config`, or by the kind in the `text_config` of a Qwen-VL.
QWEN2 = "Qwen2ForCausalLM"
FAMILIES = {
    QWEN2: Family(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3ForCausalLM": Family(transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "InternLM2ForCausalLM": Family(
        transformers.LlamaConfig, transformers.LlamaForCausalLM, "internlm2", has_bos=True
    ),
    "qwen2_5_vl": Family(
        transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration, **_QWEN_VL
    ),
    "qwen3_vl": Family(transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration, **_QWEN_VL),
}
# What stands around the question and after the answer. No published Sa2VA was trained with a system prompt.
_CHAT = ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
_PHI3 = ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>")
TEMPLATES = {"qwen_chat": _CHAT, "internlm2_chat": _CHAT, "phi3_chat": _PHI3}
REFUSED = {
    "sam3": "its masks come from SAM3 at 1008 px, not from SAM2",
    "samtok": "it writes masks as text tokens; there is no [SEG] state for SAM2",
    "llava": "its official code reads no single image, so that tensor names and pixels cannot be compared",
    "phi3forcausallm": "its language model is Phi3, which no published configuration builds any more",
}


def refuse_known(text: str, source: object) -> None:
    """Refuses the variants that are known and not supported, by name and with the reason."""
    for word, reason in REFUSED.items():
        if word in text.lower():
            advice = "Give a Sa2VA of InternVL2.5, InternVL3, InternVL3.5, Qwen2.5-VL or Qwen3-VL"
            raise CheckpointError(f"{source} is a {word.upper()} variant of Sa2VA: {reason}. {advice}.")


def family_name(values: Mapping, source: object) -> str:
    """The family that a config.json describes, by the language model's class, or by kind where that lacks."""
    refuse_known(f"{values.get('architectures')} {values.get('auto_map')} {[*values]}", source)
    text, vision, llm = (values.get(n) for n in ("text_config", "vision_config", "llm_config"))
    if isinstance(text, dict) and isinstance(vision, dict) and llm is None:
        found = str(text.get("model_type", vision.get("model_type"))).removesuffix("_text")
    else:
        llm = llm if isinstance(llm, dict) else {}
        names, kind = llm.get("architectures"), llm.get("model_type")
        # Re-saved files may lack the class, but not the model's kind.
        kinds = {"qwen2": QWEN2, "qwen3": "Qwen3ForCausalLM", "internlm2": "InternLM2ForCausalLM"}
        first = names[0] if isinstance(names, list) and names else names
        found = first or (kinds.get(kind) if isinstance(kind, str) else None) or kind or "?"
    if not isinstance(found, str) or found not in FAMILIES:
        refuse_known(str(found), source)
        known = f"{', '.join(FAMILIES)} (docs/explanation/model.md)"
        raise CheckpointError(f"{source} names the language model {found!r:.60}; supported are {known}.")
    return found


@cache
def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _fill(template: str, parts: tuple[str, ...]) -> str:
    left = iter(parts)
    return re.sub(r"[#*]", lambda _: next(left), template)


class KeyMap:
    """Official tensors to native ones and back, for one family."""

    def __init__(self, family: Family, heads: tuple[int, int], has_two_decoders: bool = False) -> None:
        self.groups, self.group = heads[1], heads[0] // heads[1] + 2  # of InternLM2: queries, key and value
        original, name = _SAM + "sam_mask_decoder.", "sam_mask_decoder" + "_modified" * has_two_decoders
        self.unused = (*_UNUSED, original) if has_two_decoders else _UNUSED
        decoder = _TABLES["decoder"] | {"official": f"{_SAM}{name}."}
        self.rows = [
            [table["native" if k else "official"] + part for k, part in enumerate(row.split())]
            for table in (*_TABLES[family.names], *_TABLES["shared"], decoder)
            for row in table["names"].strip().splitlines()
        ]

    def is_unused(self, official: str) -> bool:
        """Whether an official tensor is known and has no part in single-image segmentation."""
        return official.startswith(self.unused)

    def natives(self, official: str) -> tuple[str, ...] | None:
        """Native tensors that hold an official one, or None when the name is unknown."""
        for template, *natives in self.rows:
            if match := _pattern(template).fullmatch(official):
                return tuple(_fill(native, match.groups()) for native in natives)
        return None

    def officials(self, native: str) -> tuple[str, ...]:
        """Official tensors that a native one is stored in; the inverse of `natives`."""
        for official, *natives in self.rows:
            for template in natives:
                if match := _pattern(template).fullmatch(native):
                    if official == _POINTS:
                        return tuple(_fill(official, (str(k),)) for k in range(4))
                    return (_fill(official, match.groups()),)
        raise KeyError(f"no official name for the native tensor {native!r}")

    def split(self, official: str, tensor: Tensor) -> Iterable[tuple[str, int, Tensor]]:
        """The native tensors of an official one: name, place among the official ones it is made of, value."""
        natives = self.natives(official)
        parts: Iterable[Tensor] = [tensor] * len(natives)
        if ".wqkv." in official and tensor.shape[0] % (self.groups * self.group) == 0:
            grouped = tensor.unflatten(0, (self.groups, self.group, -1))
            rows = grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]
            parts = [part.flatten(0, 1) for part in rows]
        elif len(natives) == 3 and ".wqkv." not in official:
            parts = tensor.chunk(3)
        return [(name, _point(official) or 0, part) for name, part in zip(natives, parts, strict=False)]

    def join(self, official: str, state: Mapping[str, Tensor]) -> Tensor:
        """Puts one official tensor together from the native ones; the inverse of `split`."""
        tensors, row = [state[name] for name in self.natives(official)], _point(official)
        if row is not None:
            return tensors[0][row : row + 1].contiguous()
        if ".wqkv." in official:
            return torch.cat([part.unflatten(0, (self.groups, -1)) for part in tensors], 1).flatten(0, 1)
        return torch.cat(tensors) if len(tensors) == 3 else tensors[0].contiguous()


def has_two_decoders(official: Iterable[str]) -> bool:
    """Whether tensors are a Sa2VA-i's: the decoder called `modified` is trained, SAM2's own is for videos."""
    return any(name.startswith(_SAM + "sam_mask_decoder_modified.") for name in official)


def _point(official: str) -> int | None:
    """The row of the point-embedding table that an official tensor fills, or None for any other tensor."""
    match = _pattern(_POINTS).fullmatch(official)
    return int(match[1]) if match else None
