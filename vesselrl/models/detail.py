"""The detail head: a small U-Net that refines a mask at the image's own size.

Sa2VA's mask decoder works on a grid of a quarter of SAM2's square and loses thin and faint vessels. The head
sees the image itself beside the decoder's logits. It fits any Sa2VA; its first weights, shipped with the
package, are trained on synthetic images of many kinds (`python -m benchmarks.pretrain_detail`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES = (8, 16, 32, 64, 64, 8)
MULTIPLE = 16  # px; four halvings
SMALLEST = 32  # px; below that the deepest level has one pixel and nothing to normalise with
LARGEST_LOGIT, LOGIT_SCALE = 10.0, 4.0  # a sure mask must not drown the image


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
    """Mask logits at native size from the image and Sa2VA's logits there, which are clamped to ±10 over 4."""

    def __init__(self) -> None:
        super().__init__(num_maps=1)

    def forward(self, pixels: Tensor, logits: Tensor) -> Tensor:
        """(H, W) logits of grey pixels and coarse logits (H, W); coarse logits of 0 say nothing."""
        return super().forward(pixels, logits.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / LOGIT_SCALE)
