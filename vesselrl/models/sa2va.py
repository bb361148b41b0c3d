"""Sa2VA composed from transformers' own modules: InternViT, a projector, Qwen2 and SAM2.

One teacher-forced pass: image tokens and text go through the language model, the last hidden state at each
[SEG] becomes a prompt token of SAM2's mask decoder, and the mask logits are brought to the image's own size.
Everything is differentiable and nothing here calls `generate`. The parts can be run one by one, so that an
image is encoded once and decoded many times.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLVisionModel, Qwen2ForCausalLM, Sam2Model

from vesselrl.models.config import Sa2VAConfig
from vesselrl.models.processing import Sa2VAInputs


class ImageFeatures(NamedTuple):
    """SAM2's raw feature pyramid of B images at S px, before anything that the mask decoder owns.

    Attributes:
        low: (B, C, S/16, S/16).
        mid: (B, C, S/8, S/8).
        high: (B, C, S/4, S/4).
    """

    low: Tensor
    mid: Tensor
    high: Tensor


class DecodedMasks(NamedTuple):
    """Mask decoder output for B images with P prompts each.

    Attributes:
        logits: (B, P, 3, S/4, S/4), three candidate masks per prompt.
        iou: (B, P, 3), the decoder's own estimate of their quality.
    """

    logits: Tensor
    iou: Tensor

    def best(self) -> Tensor:
        """(B, P) long, the candidate with the largest estimated IoU; official inference takes this one."""
        return self.iou.argmax(-1)

    def select(self, index: Tensor) -> Tensor:
        """(B, P, S/4, S/4), one candidate per prompt."""
        height, width = self.logits.shape[-2:]
        return self.logits.gather(2, index[..., None, None, None].expand(-1, -1, 1, height, width)).squeeze(2)


class Sa2VA(nn.Module):
    """The whole model; see the module's docstring for the path of one image.

    Attributes:
        vision: InternViT tower. projector: pixel-shuffled patches to language tokens (official `mlp1`).
        lm: language model. text_hidden_fcs: [SEG] state to SAM2 prompt. sam: SAM2.
    """

    def __init__(self, config: Sa2VAConfig) -> None:
        super().__init__()
        self.config = config
        vision, llm = config.native_vision(), config.native_llm()
        shuffled = vision.hidden_size * round(1 / config.downsample_ratio) ** 2
        self.vision = InternVLVisionModel(vision)
        self.projector = nn.Sequential(
            nn.LayerNorm(shuffled),
            nn.Linear(shuffled, llm.hidden_size),
            nn.GELU(),
            nn.Linear(llm.hidden_size, llm.hidden_size),
        )
        self.lm = Qwen2ForCausalLM(llm)
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(llm.hidden_size, llm.hidden_size),
            nn.ReLU(),
            nn.Linear(llm.hidden_size, config.sam2.hidden_size),
        )
        self.sam = Sam2Model(config.sam2.native())
        self.sam.vision_encoder.neck.position_encoding = _NoPositions()
        # Set by the loader, which knows the tokenizer: ids of <IMG_CONTEXT> and [SEG].
        self.image_token_id = -1
        self.seg_token_id = -1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sam.no_memory_embedding.device

    def forward(self, inputs: Sa2VAInputs) -> list[Tensor]:
        """Mask logits (H, W) of every image at its own size; the union of its [SEG] masks if several."""
        decoded = self.decode(self.encode_image(inputs.sam_pixels), self.seg_prompts(inputs))
        return upsample(decoded.select(decoded.best()), inputs.sizes, self.config.sam2.image_size)

    def image_tokens(self, tiles: Tensor) -> Tensor:
        """(T, tokens, hidden): what the language model sees of T tiles."""
        patches = self.vision(tiles.to(self._dtype(self.vision))).last_hidden_state[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        grid = pixel_shuffle(patches.unflatten(1, (side, side)), round(1 / self.config.downsample_ratio))
        return self.projector(grid.flatten(1, 2))

    def seg_prompts(self, inputs: Sa2VAInputs) -> Tensor:
        """(B, P, C) prompt tokens for SAM2, from the hidden state at each of the P [SEG] tokens.

        Raises:
            ValueError: the image tokens in the text do not match the tiles, or images differ in their number
                of [SEG].
        """
        states = self.seg_states(inputs)
        return self.text_hidden_fcs(states.to(self._dtype(self.text_hidden_fcs)))

    def seg_states(self, inputs: Sa2VAInputs) -> Tensor:
        """(B, P, hidden): last hidden state, after the final norm, where [SEG] is the input token."""
        ids = inputs.input_ids
        embeds = self.lm.get_input_embeddings()(ids)
        image_tokens = self.image_tokens(inputs.tiles).flatten(0, 1)
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(image_tokens):
            raise ValueError(
                f"The text has {int(is_image.sum())} image tokens but the tiles give {len(image_tokens)}; "
                "use the processor of the same checkpoint."
            )
        embeds = embeds.masked_scatter(is_image[..., None], image_tokens.to(embeds.dtype))
        hidden = self.lm.model(
            inputs_embeds=embeds, attention_mask=inputs.attention_mask, use_cache=False
        ).last_hidden_state
        is_seg = ids == self.seg_token_id
        per_image = is_seg.sum(1)
        if int(per_image.min()) == 0 or int(per_image.min()) != int(per_image.max()):
            raise ValueError(
                f"Images of one batch need the same number of [SEG] tokens, got {per_image.tolist()}."
            )
        return hidden[is_seg].view(len(ids), -1, hidden.shape[-1])

    def encode_image(self, sam_pixels: Tensor) -> ImageFeatures:
        """SAM2's image encoder, once per image; (B, 3, S, S) in."""
        pyramid = self.sam.vision_encoder(sam_pixels).fpn_hidden_states  # high to low resolution
        return ImageFeatures(low=pyramid[2], mid=pyramid[1], high=pyramid[0])

    def decode(self, features: ImageFeatures, prompts: Tensor) -> DecodedMasks:
        """The mask decoder, any number of times per encoded image; prompts (B, P, C)."""
        sam = self.sam
        batch, num_prompts, channels = prompts.shape
        no_points = prompts.new_zeros(batch, num_prompts, 1, 2)
        padding = torch.full((batch, num_prompts, 1), -1, dtype=torch.int32, device=prompts.device)
        sparse, dense = sam.prompt_encoder(
            input_points=no_points, input_labels=padding, input_boxes=None, input_masks=None
        )
        positions = sam.get_image_wide_positional_embeddings().repeat(batch, 1, 1, 1)
        logits, iou, _, _ = sam.mask_decoder(
            image_embeddings=features.low + sam.no_memory_embedding.view(1, channels, 1, 1),
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=torch.cat([sparse, prompts[:, :, None]], dim=2),
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[
                sam.mask_decoder.conv_s0(features.high),
                sam.mask_decoder.conv_s1(features.mid),
            ],
        )
        return DecodedMasks(logits, iou)

    @staticmethod
    def _dtype(module: nn.Module) -> torch.dtype:
        return next(module.parameters()).dtype


class _NoPositions(nn.Module):
    """In place of the position maps of SAM2's image encoder.

    Only SAM2's video memory reads them; making them anew for every image took a sixth of the encoder's time.
    """

    def forward(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """An empty tensor."""
        return torch.empty(0, dtype=dtype, device=device)


def pixel_shuffle(grid: Tensor, factor: int) -> Tensor:
    """Gathers factor x factor neighbouring patches into one token (official `ps_version` v2).

    Args:
        grid: (T, H, W, C) patches.
        factor: neighbours per side.

    Returns:
        (T, H / factor, W / factor, C * factor^2); channels ordered by row, column inside the block, then C.
    """
    count, height, width, channels = grid.shape
    blocks = grid.view(count, height // factor, factor, width // factor, factor, channels)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(count, height // factor, width // factor, -1)


def upsample(low_res: Tensor, sizes: tuple[tuple[int, int], ...], sam_px: int) -> list[Tensor]:
    """Mask logits at each image's own size, in two bilinear steps as official inference does.

    Args:
        low_res: (B, P, S/4, S/4); with P > 1 the union (largest logit) is returned.
        sizes: (height, width) of every image.
        sam_px: S; the step over S x S is kept because leaving it out moves logits by up to 0.9.

    Returns:
        B float tensors (H, W).
    """
    full = functional.interpolate(
        low_res.float(), size=(sam_px, sam_px), mode="bilinear", align_corners=False
    )
    if len(set(sizes)) == 1:
        native = functional.interpolate(full, size=sizes[0], mode="bilinear", align_corners=False)
        return list(native.amax(1).unbind(0))
    pieces = zip(full.split(1), sizes, strict=True)
    return [
        functional.interpolate(piece, size=size, mode="bilinear", align_corners=False).amax(1)[0]
        for piece, size in pieces
    ]
