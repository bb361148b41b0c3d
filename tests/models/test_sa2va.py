"""The native model against the outputs of the official one, stage by stage (float32, tolerance 1e-4)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from vesselrl.models.checkpoint import load_sa2va
from vesselrl.models.config import Sam2Dimensions
from vesselrl.models.lora import SCOPES, LoraPreset, attach_lora
from vesselrl.models.processing import Sa2VAInputs, tile_grid
from vesselrl.models.sa2va import Sa2VA, upsample


class Sample(NamedTuple):
    """One image's official outputs by stage, and the native model's inputs for it."""

    model: Sa2VA
    inputs: Sa2VAInputs
    num_seg: int
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def samples(shared_folder: Path) -> list[Sample]:
    folder = shared_folder / "sa2va-reference"
    expected = json.loads((folder / "expected.json").read_text())
    s = expected["sam"]
    fields = {"image_size": "image_size", "hidden_size": "d"}
    fields |= {"decoder_mlp_dim": "mlp", "iou_head_hidden_dim": "iou"}
    tuples = {"blocks_per_stage": "stages", "window_size_per_stage": "win"}
    tuples |= {"global_attention_blocks": "gab", "background_size": "bkg"}
    doubled = {"embed_dim_per_stage": "embed_dim", "num_attention_heads_per_stage": "num_heads"}
    sam2 = {field: s[name] for field, name in fields.items()}
    sam2 |= {field: tuple(s[name]) for field, name in tuples.items()}
    sam2 |= {field: tuple(s[name] * factor for factor in (1, 2, 4, 8)) for field, name in doubled.items()}
    model, processor = load_sa2va(folder, sam2=Sam2Dimensions(**sam2))
    tensors, found = load_file(folder / "expected.safetensors"), []
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith("sam_")}
    for k, sample in enumerate(expected["samples"]):
        image = np.asarray(Image.open(folder / sample["image"]).convert("RGB"))
        inputs = processor([image], sample["prompt"], sample["answer"])
        own = {n.removeprefix(f"s{k}."): t for n, t in tensors.items() if n.startswith(f"s{k}.")}
        found.append(Sample(model, inputs, sample["n_seg"], own | shared))
    return found


@torch.no_grad()
def native_stages(sample: Sample) -> dict[str, torch.Tensor]:
    """What the native model gives at every stored stage."""
    model, inputs = sample.model, sample.inputs
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
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    no_points = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -1, dtype=torch.int32)
    sparse, dense = model.sam.prompt_encoder(*no_points, input_boxes=None, input_masks=None)
    stages = {
        "pixel_values": inputs.tiles,
        "g_image_u8": (inputs.sam_pixels[0] * std + mean) * 255,
        "vit_last_hidden": patches,
        "vit_embeds": tokens,
        "inputs_embeds": embeds[:, : len(sample.tensors["prompt_ids"])],
        "lm_last_hidden": language.hidden_states[-1],
        "lm_logits": language.logits,
        "seg_hidden": model.seg_states(inputs)[0],
        "seg_prompt": prompts[0],
        "hiera_stage_3": hiera,
        "sam_fpn_0": decoder.conv_s0(features.high),
        "sam_fpn_1": decoder.conv_s1(features.mid),
        "sam_fpn_2": features.low,
        "sam_dense_prompt": dense[..., :1, :1],
        "sam_image_pe": model.sam.get_image_wide_positional_embeddings(),
    }
    best, size = decoded.best(), model.config.sam2.image_size
    for j in range(sample.num_seg):
        low_res = decoded.select(best)[:, j : j + 1]
        stages |= {
            f"seg{j}.sparse": torch.cat([sparse[:, 0], prompts[:, j : j + 1]], dim=1),
            f"seg{j}.image_embeddings": features.low + model.sam.no_memory_embedding.view(1, -1, 1, 1),
            f"seg{j}.masks": decoded.logits[:, j],
            f"seg{j}.iou": decoded.iou[:, j],
            f"seg{j}.mask_logits": upsample(low_res, inputs.sizes, size)[0][None],
            f"seg{j}.mask_logits_sam_res": functional.interpolate(low_res, (size, size), mode="bilinear"),
        }
    return stages


@pytest.mark.parametrize("k", range(3))
def test_every_stage_agrees_with_the_official_model(samples: list[Sample], k: int) -> None:
    stages, wanted = native_stages(samples[k]), samples[k].tensors
    later = {f"seg{j}.mask_logits_sam_res" for j in range(samples[k].num_seg)}
    assert stages.keys() - wanted.keys() == (later if k else set())  # stored for the first sample only
    for name in stages.keys() & wanted.keys():
        assert stages[name].shape == wanted[name].shape
        gap = float((stages[name].float() - wanted[name].float()).abs().max())
        assert gap / (255 if name == "g_image_u8" else 1) <= 1e-4, name


@pytest.mark.parametrize("k", range(3))
@torch.no_grad()
def test_tokens_and_final_masks_are_identical(samples: list[Sample], k: int) -> None:
    model, inputs, num_seg, wanted = samples[k]
    assert inputs.input_ids[0].tolist() == torch.cat([wanted["prompt_ids"], wanted["answer_ids"]]).tolist()
    decoded = model.decode(model.encode_image(inputs.sam_pixels), model.seg_prompts(inputs))
    low_res = decoded.select(decoded.best())
    masks = []
    for j in range(num_seg):
        masks.append(upsample(low_res[:, j : j + 1], inputs.sizes, model.config.sam2.image_size)[0] > 0)
        assert torch.equal(masks[-1], wanted[f"seg{j}.mask"][0].bool())
    assert torch.equal(model(inputs)[0] > 0, torch.stack(masks).any(0))


def test_tile_grids_follow_the_official_rule(shared_folder: Path) -> None:
    table = json.loads((shared_folder / "sa2va-reference" / "tiling_448.json").read_text())
    for width, height, max_tiles, columns, rows in table["rows"]:
        assert tile_grid(width, height, 448, max_tiles) == (columns, rows), (width, height, max_tiles)


@pytest.mark.parametrize("training", [False, True])
def test_blocks_computed_twice_give_the_same_gradients_for_less_memory(tiny_checkpoint, training) -> None:
    """In evaluation mode too, where transformers' own flag does nothing; PPO steps run in it."""
    gradients, kept = [], []
    for recomputing in (False, True):
        torch.manual_seed(0)
        model, processor = load_sa2va(tiny_checkpoint)
        size = LoraPreset(4, 8, 0.1 * training, ("q_proj",))
        adapted = attach_lora(model, SCOPES, size).train(training)
        if recomputing:
            model.recompute_blocks()
            model.recompute_blocks()  # a second time changes nothing
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.05)
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        sizes: dict[int, int] = {}

        def count(x: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            (logits,) = model(processor([image]))
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
        kept.append(sum(sizes.values()))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-9), name
    assert kept[1] < 0.7 * kept[0]
