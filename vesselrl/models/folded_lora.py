"""LoRA layers that add the adapter to the weight before the product, instead of running it beside the layer.

    y = x (W + s B A)^T    in place of    y = x W^T + s (x A^T) B^T

The value and the gradients are the same, the work is not: on SAM2's large feature maps with few channels the
small matrix B A costs nothing, while the second path over the activations costs more than the layer itself.
In a language model it is the other way round, so there PEFT's own layers stay.
"""

from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional


class _Folded:
    """What both layers share: when folding is allowed, and the weight with its adapters."""

    def can_fold(self) -> bool:
        """False where the two forms differ, or a half-precision weight would swallow a small adapter."""
        return not (self.merged or self.disable_adapters) and all(
            self.base_layer.weight.dtype == self.lora_A[name].weight.dtype
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            for name in self.active_adapters
        )

    def folded_weight(self) -> Tensor:
        """W + s B A, summed over the active adapters."""
        return sum((self.get_delta_weight(name) for name in self.active_adapters), self.base_layer.weight)


class FoldedLinear(_Folded, lora.Linear):
    """PEFT's LoRA on `nn.Linear`, folded."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out); images for the convolution."""
        if not self.can_fold():
            return super().forward(x)
        return functional.linear(x, self.folded_weight(), self.base_layer.bias)


class FoldedConv2d(_Folded, lora.Conv2d):
    """PEFT's LoRA on `nn.Conv2d`, folded."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out); images for the convolution."""
        if not self.can_fold():
            return super().forward(x)
        conv = self.base_layer
        placed = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return functional.conv2d(x, self.folded_weight(), conv.bias, *placed)


def fold_adapters(peft_model: PeftModel) -> int:
    """Turns the LoRA layers outside the language model into folded ones, in place; returns how many."""
    folded = {lora.Linear: FoldedLinear, lora.Conv2d: FoldedConv2d}
    layers = [
        layer
        for name, layer in peft_model.named_modules()
        if type(layer) in folded and ".lm." not in f".{name}."
    ]
    for layer in layers:
        layer.__class__ = folded[type(layer)]
    return len(layers)
