"""The native model against the outputs of the official one, stage by stage (float32, tolerance 1e-4)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.config import Sam2Dimensions
from vesselrl.models.processing import Sa2VAInputs, Sa2VAProcessor, tile_grid
from vesselrl.models.sa2va import Sa2VA, upsample

TOLERANCE = 1e-4


class Reference(NamedTuple):
    """Official outputs and the native model loaded from the same folder."""

    model: Sa2VA
    processor: Sa2VAProcessor
    folder: Path
    expected: dict
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference(shared_folder: Path) -> Reference:
    folder = shared_folder / "sa2va-reference"
    expected = json.loads((folder / "expected.json").read_text())
    s, doubled = expected["sam"], (1, 2, 4, 8)
    sam2 = Sam2Dimensions(
        s["image_size"],
        embed_dim_per_stage=tuple(s["embed_dim"] * factor for factor in doubled),
        blocks_per_stage=tuple(s["stages"]),
        num_attention_heads_per_stage=tuple(s["num_heads"] * factor for factor in doubled),
        window_size_per_stage=tuple(s["win"]),
        global_attention_blocks=tuple(s["gab"]),
        background_size=tuple(s["bkg"]),
        hidden_size=s["d"],
        decoder_mlp_dim=s["mlp"],
        iou_head_hidden_dim=s["iou"],
    )
    model, processor = load_sa2va(folder, sam2=sam2)
    return Reference(model, processor, folder, expected, load_file(folder / "expected.safetensors"))


def gap(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.float() - wanted.float()).abs().max())


def read_inputs(reference: Reference, k: int) -> Sa2VAInputs:
    sample = reference.expected["samples"][k]
    image = np.asarray(Image.open(reference.folder / sample["image"]).convert("RGB"))
    return reference.processor([image], sample["prompt"], sample["answer"])


@torch.no_grad()
def stage_gaps(reference: Reference, k: int) -> dict[str, float]:
    """Largest absolute difference of every stored stage of sample k."""
    model, inputs = reference.model, read_inputs(reference, k)

    def wanted(name: str) -> torch.Tensor:
        return reference.tensors[f"s{k}.{name}"]

    patches = model.vision(inputs.tiles).last_hidden_state
    tokens = model.image_tokens(inputs.tiles)
    is_image = inputs.input_ids == model.image_token_id
    embeds = model.lm.get_input_embeddings()(inputs.input_ids)
    embeds = embeds.masked_scatter(is_image[..., None], tokens.flatten(0, 1))
    language = model.lm(inputs_embeds=embeds, output_hidden_states=True)
    features = model.encode_image(inputs.sam_pixels)
    hiera = model.sam.vision_encoder.backbone(inputs.sam_pixels).last_hidden_state.permute(0, 3, 1, 2)
    decoder = model.sam.mask_decoder
    prompts = model.seg_prompts(inputs)
    decoded = model.decode(features, prompts)
    prompt_length = len(wanted("prompt_ids"))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    gaps = {
        "pixel_values": gap(inputs.tiles, wanted("pixel_values")),
        "g_image_u8": gap(inputs.sam_pixels[0] * std + mean, wanted("g_image_u8") / 255),
        "vit_last_hidden": gap(patches, wanted("vit_last_hidden")),
        "vit_embeds": gap(tokens, wanted("vit_embeds")),
        "inputs_embeds": gap(embeds[:, :prompt_length], wanted("inputs_embeds")),
        "lm_last_hidden": gap(language.hidden_states[-1], wanted("lm_last_hidden")),
        "lm_logits": gap(language.logits, wanted("lm_logits")),
        "seg_hidden": gap(model.seg_states(inputs)[0], wanted("seg_hidden")),
        "seg_prompt": gap(prompts[0], wanted("seg_prompt")),
        "hiera_stage_3": gap(hiera, wanted("hiera_stage_3")),
        "sam_fpn_0": gap(decoder.conv_s0(features.high), wanted("sam_fpn_0")),
        "sam_fpn_1": gap(decoder.conv_s1(features.mid), wanted("sam_fpn_1")),
        "sam_fpn_2": gap(features.low, wanted("sam_fpn_2")),
    }
    no_points = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -1, dtype=torch.int32)
    sparse, dense = model.sam.prompt_encoder(*no_points, input_boxes=None, input_masks=None)
    gaps["sam_dense_prompt"] = gap(dense[..., :1, :1], reference.tensors["sam_dense_prompt"])
    position = model.sam.get_image_wide_positional_embeddings()
    gaps["sam_image_pe"] = gap(position, reference.tensors["sam_image_pe"])
    best, size = decoded.best(), model.config.sam2.image_size
    for j in range(reference.expected["samples"][k]["n_seg"]):
        low_res = decoded.select(best)[:, j : j + 1]
        with_language = torch.cat([sparse[:, 0], prompts[:, j : j + 1]], dim=1)
        sam_res = torch.nn.functional.interpolate(low_res, size=(size, size), mode="bilinear")
        no_memory = model.sam.no_memory_embedding.view(1, -1, 1, 1)
        per_seg = {
            "sparse": gap(with_language, wanted(f"seg{j}.sparse")),
            "image_embeddings": gap(features.low + no_memory, wanted(f"seg{j}.image_embeddings")),
            "masks": gap(decoded.logits[:, j], wanted(f"seg{j}.masks")),
            "iou": gap(decoded.iou[:, j], wanted(f"seg{j}.iou")),
            "mask_logits": gap(upsample(low_res, inputs.sizes, size)[0][None], wanted(f"seg{j}.mask_logits")),
        }
        if f"s{k}.seg{j}.mask_logits_sam_res" in reference.tensors:  # stored for the first sample only
            per_seg["mask_logits_sam_res"] = gap(sam_res, wanted(f"seg{j}.mask_logits_sam_res"))
        gaps |= {name: max(value, gaps.get(name, 0.0)) for name, value in per_seg.items()}
    return gaps


def test_every_stage_agrees_with_the_official_model(reference: Reference) -> None:
    largest: dict[str, float] = {}
    for k in range(3):
        for name, value in stage_gaps(reference, k).items():
            largest[name] = max(value, largest.get(name, 0.0))
    assert {name: value for name, value in largest.items() if value > TOLERANCE} == {}
    assert len(largest) == 21


@pytest.mark.parametrize("k", range(3))
def test_tokens_and_final_masks_are_identical(reference: Reference, k: int) -> None:
    inputs = read_inputs(reference, k)
    names = (f"s{k}.prompt_ids", f"s{k}.answer_ids")
    assert inputs.input_ids[0].tolist() == torch.cat([reference.tensors[name] for name in names]).tolist()
    with torch.no_grad():
        decoded = reference.model.decode(
            reference.model.encode_image(inputs.sam_pixels), reference.model.seg_prompts(inputs)
        )
        union = reference.model(inputs)[0] > 0
    masks = []
    for j in range(reference.expected["samples"][k]["n_seg"]):
        low_res = decoded.select(decoded.best())[:, j : j + 1]
        masks.append(upsample(low_res, inputs.sizes, reference.model.config.sam2.image_size)[0] > 0)
        assert torch.equal(masks[-1], reference.tensors[f"s{k}.seg{j}.mask"][0].bool())
    assert torch.equal(union, torch.stack(masks).any(0))


def test_tile_grids_follow_the_official_rule(shared_folder: Path) -> None:
    table = json.loads((shared_folder / "sa2va-reference" / "tiling_448.json").read_text())
    for width, height, max_tiles, columns, rows in table["rows"]:
        assert tile_grid(width, height, 448, max_tiles) == (columns, rows), (width, height, max_tiles)
