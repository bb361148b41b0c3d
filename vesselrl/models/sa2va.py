"""Sa2VA composed from transformers' own modules: vision tower, projector, language model and SAM2.

One teacher-forced pass: image tokens and text go through the language model, the last hidden state at each
[SEG] becomes a prompt token of SAM2's mask decoder. Everything is differentiable, nothing calls `generate`.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import InternVLVisionModel, Sam2Model

from vesselrl.models.config import Sa2VAConfig
from vesselrl.models.families import KeyMap
from vesselrl.models.processing import Sa2VAInputs

# Native names of the parts: what a [SEG] state comes from, what makes a mask of it, and what neither needs.
LANGUAGE = ("vision.", "projector.", "lm.")
MASKS = ("text_hidden_fcs.", "sam.")
HEAD = ("lm.lm_head.",)
FEATURES = (8, 16, 32, 64, 64, 8)  # of the detail head
MULTIPLE = 16  # px; four halvings
SMALLEST = 32  # px; below that the deepest level has one pixel and nothing to normalise with
LARGEST_LOGIT, LOGIT_SCALE = 10.0, 4.0  # a sure mask must not drown the image


class ImageFeatures(NamedTuple):
    """SAM2's raw feature pyramid of B images at S px, before anything that the mask decoder owns."""

    low: Tensor  # (B, C, S/16, S/16)
    mid: Tensor  # (B, C, S/8, S/8)
    high: Tensor  # (B, C, S/4, S/4)


class DecodedMasks(NamedTuple):
    """Candidate masks of B images with P prompts each, and the decoder's own estimate of their quality."""

    logits: Tensor  # (B, P, 3, S/4, S/4)
    iou: Tensor  # (B, P, 3)

    def best(self) -> Tensor:
        """(B, P) long, the candidate with the largest estimated IoU, as in official inference."""
        return self.iou.argmax(-1)

    def select(self, index: Tensor) -> Tensor:
        """(B, P, S/4, S/4), one candidate per prompt."""
        height, width = self.logits.shape[-2:]
        return self.logits.gather(2, index[..., None, None, None].expand(-1, -1, 1, height, width)).squeeze(2)


class _NoPositions(nn.Module):
    """Stands for the slow position maps of SAM2's image encoder, which only its video memory reads."""

    def forward(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device=device)


class GreyUNet(nn.Module):
    """MONAI's BasicUNet with 0.3 million weights on a grey image of any size and on maps beside it."""

    def __init__(self, num_maps: int = 0) -> None:
        from monai.networks.nets import BasicUNet

        super().__init__()
        self.unet = BasicUNet(2, in_channels=1 + num_maps, out_channels=1, features=FEATURES)

    def forward(self, pixels: Tensor, *maps: Tensor) -> Tensor:
        """(H, W) logits of grey pixels (H, W), which are standardised, and of maps (H, W) as they are."""
        grey = pixels.float()
        grey = (grey - grey.mean()) / grey.std(correction=0).clamp(min=1.0)
        height, width = grey.shape
        below, right = (max(SMALLEST, -(-size // MULTIPLE) * MULTIPLE) - size for size in (height, width))
        padded = functional.pad(torch.stack([grey, *maps])[None], (0, right, 0, below), mode="replicate")
        return self.unet(padded)[0, 0, :height, :width]


class DetailHead(GreyUNet):
    """Refines a mask at native size from the image and Sa2VA's logits there, which are clamped to ±10 over 4.

    The mask decoder works on a grid of a quarter of SAM2's square and loses thin and faint vessels. The head
    fits any Sa2VA; its first weights, shipped with the package, are trained on synthetic images of many kinds
    (`python -m benchmarks.pretrain_detail`).
    """

    def __init__(self) -> None:
        super().__init__(num_maps=1)

    def forward(self, pixels: Tensor, logits: Tensor) -> Tensor:
        """(H, W) logits of grey pixels and coarse logits (H, W); coarse logits of 0 say nothing."""
        return super().forward(pixels, logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / LOGIT_SCALE)


class Sa2VA(nn.Module):
    """The whole model, whose parts can be run one by one: an image is encoded once and decoded many times.

    `projector` takes pixel-shuffled patches to language tokens, `text_hidden_fcs` a [SEG] state to a prompt.
    A Qwen-VL has its vision tower within `lm`, and no `vision` and `projector` beside it.
    """

    def __init__(self, config: Sa2VAConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.llm["hidden_size"]
        self.keys = KeyMap(config.family, config.heads)  # the loader puts that of the files here
        self.vision = self.projector = None
        if not config.family.is_whole:
            vision = config.native_vision()
            self.shuffle_factor = round(1 / config.downsample_ratio)
            shuffled = vision.hidden_size * self.shuffle_factor**2
            self.vision = InternVLVisionModel(vision)
            self.projector = nn.Sequential(
                nn.LayerNorm(shuffled), nn.Linear(shuffled, hidden), nn.GELU(), nn.Linear(hidden, hidden)
            )
        self.lm = config.family.language_model(config.native_llm())
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.sam2.hidden_size)
        )
        self.sam = Sam2Model(config.sam2.native())
        self.sam.vision_encoder.neck.position_encoding = _NoPositions()
        # Ids of <IMG_CONTEXT> and [SEG], set by the loader, which knows the tokenizer.
        self.image_token_id = self.seg_token_id = -1
        self.autocasts = False  # whether SAM2's image encoder computes in bfloat16
        self.detail: DetailHead | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def leave_out(self, prefixes: tuple[str, ...]) -> None:
        """Removes parts of the model, each named by the beginning of its parameters' names."""
        for prefix in prefixes:
            parent, _, name = prefix.rstrip(".").rpartition(".")
            setattr(self.get_submodule(parent), name, None)

    def forward(self, inputs: Sa2VAInputs) -> list[Tensor]:
        """Mask logits (H, W) of every image at its own size; the union of its [SEG] masks if several."""
        decoded = self.decode(self.encode_image(inputs.sam_pixels), self.seg_prompts(inputs))
        return self.native_logits(decoded, decoded.best(), inputs)

    def native_logits(self, decoded: DecodedMasks, choice: Tensor, inputs: Sa2VAInputs) -> list[Tensor]:
        """(H, W) logits per image of the chosen candidates (B, P), refined where there is a detail head."""
        coarse = upsample(decoded.select(choice), inputs.sizes, self.config.sam2.image_size)
        return [*map(self.detail, inputs.pixels, coarse)] if self.detail else coarse

    def image_tokens(self, tiles: Tensor) -> Tensor:
        """(T, tokens, hidden): the language model's view of T tiles."""
        patches = self.vision(tiles.to(next(self.vision.parameters()).dtype)).last_hidden_state[:, 1:]
        # The pixel shuffle `v2`: the channels of a token go by row and column in its f x f patches, then C.
        factor, side = self.shuffle_factor, round(patches.shape[1] ** 0.5)
        blocks = patches.unflatten(1, (side // factor, factor, side // factor, factor)).transpose(2, 3)
        return self.projector(blocks.flatten(3).flatten(1, 2))

    def seg_prompts(self, inputs: Sa2VAInputs) -> Tensor:
        """(B, P, C) prompt tokens for SAM2, from the hidden state at each of the P [SEG] tokens."""
        return self.text_hidden_fcs(self.seg_states(inputs).to(self.text_hidden_fcs[0].weight.dtype))

    def seg_states(self, inputs: Sa2VAInputs) -> Tensor:
        """(B, P, hidden): last hidden state, after the final norm, where [SEG] is the input token."""
        ids, is_image = inputs.input_ids, inputs.input_ids == self.image_token_id
        if self.config.family.is_whole:
            given = {"input_ids": ids, "pixel_values": inputs.tiles, "image_grid_thw": inputs.grids}
            given["mm_token_type_ids"] = is_image.int()  # positions of image tokens are of two dimensions
        else:
            given = {"inputs_embeds": self.embed(ids, is_image, inputs.tiles)}
        output = self.lm.model(**given, attention_mask=inputs.attention_mask, use_cache=False)
        hidden = output.last_hidden_state
        is_seg = ids == self.seg_token_id
        return hidden[is_seg].view(len(ids), -1, hidden.shape[-1])

    def embed(self, ids: Tensor, is_image: Tensor, tiles: Tensor) -> Tensor:
        """(B, L, hidden) embeddings of the text, with the image tokens in their places."""
        embeds, image_tokens = self.lm.get_input_embeddings()(ids), self.image_tokens(tiles).flatten(0, 1)
        if (count := int(is_image.sum())) != len(image_tokens):
            fault = f"The text has {count} image tokens but the tiles give {len(image_tokens)}"
            raise ValueError(f"{fault}; use the processor of the same checkpoint.")
        return embeds.masked_scatter(is_image[..., None], image_tokens.to(embeds.dtype))

    def encode_image(self, sam_pixels: Tensor) -> ImageFeatures:
        """SAM2's image encoder, once per image; (B, 3, S, S) in."""
        device = "cuda" if sam_pixels.is_cuda else "cpu"  # others, such as meta, cannot
        with torch.autocast(device, torch.bfloat16, enabled=self.autocasts):
            high, mid, low = self.sam.vision_encoder(sam_pixels).fpn_hidden_states[:3]
        return ImageFeatures(low, mid, high)

    def language_layers(self) -> nn.ModuleList:
        """The blocks of the language model."""
        return getattr(self.lm.model, "language_model", self.lm.model).layers

    def recompute_blocks(self) -> None:
        """Computes what is inside SAM2's and the language model's blocks a second time for the gradient.

        No value changes. Unlike transformers' own flag it also works in evaluation mode, that of PPO.
        """
        layers = self.language_layers() if self.lm else ()
        for block in (*self.sam.vision_encoder.backbone.blocks, *layers):
            if "forward" not in vars(block):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def decode(self, features: ImageFeatures, prompts: Tensor) -> DecodedMasks:
        """The mask decoder, any number of times per encoded image; prompts (B, P, C)."""
        features = ImageFeatures(*(level.float() for level in features))
        sam, conv_s0, conv_s1 = self.sam, self.sam.mask_decoder.conv_s0, self.sam.mask_decoder.conv_s1
        batch, num_prompts, channels = prompts.shape
        no_points = prompts.new_zeros(batch, num_prompts, 1, 2)
        padding = torch.full((batch, num_prompts, 1), -1, dtype=torch.int32, device=prompts.device)
        sparse, dense = sam.prompt_encoder(no_points, padding, input_boxes=None, input_masks=None)
        logits, iou, _, _ = sam.mask_decoder(
            image_embeddings=features.low + sam.no_memory_embedding.view(1, channels, 1, 1),
            image_positional_embeddings=sam.get_image_wide_positional_embeddings().repeat(batch, 1, 1, 1),
            sparse_prompt_embeddings=torch.cat([sparse, prompts[:, :, None]], dim=2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[conv_s0(features.high), conv_s1(features.mid)],
        )
        return DecodedMasks(logits, iou)


def upsample(low_res: Tensor, sizes: tuple[tuple[int, int], ...], sam_px: int) -> list[Tensor]:
    """(B, P, S/4, S/4) mask logits to B of each image's own size, (H, W); of several prompts the largest.

    Bilinear in two steps, over S x S, as official inference does: one step would move logits by up to 0.9.
    """
    resize = partial(functional.interpolate, mode="bilinear", align_corners=False)
    full = resize(low_res.float(), (sam_px, sam_px))
    if len(set(sizes)) == 1:
        return list(resize(full, sizes[0]).amax(1).unbind(0))
    return [resize(one, size).amax(1)[0] for one, size in zip(full.split(1), sizes, strict=True)]
