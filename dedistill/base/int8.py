"""An int8 linear made of plain tensors.

Tensor subclasses (quanto, torchao) break under DDP, FSDP2, ZeRO-3, deepcopy or safetensors, each in its own way; two
ordinary frozen parameters work everywhere. The codes equal optimum-quanto's qint8: symmetric, one scale per output row.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QMAX = 127


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] and scale [out, 1] of ``weight`` [out, in], in the weight's own dtype as quanto does."""
    scale = weight.abs().amax(1, keepdim=True) / QMAX
    codes = torch.round(weight / torch.where(scale == 0, 1, scale)).clamp(-QMAX - 1, QMAX)
    return codes.to(torch.int8), scale


class _Int8Matmul(torch.autograd.Function):
    """y = x W^T + b with W = codes * scale rebuilt in both passes: nothing weight-sized is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, codes.to(x.dtype) * scale.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        codes, scale = ctx.saved_tensors
        return grad @ (codes.to(grad.dtype) * scale.to(grad.dtype)), None, None, None


class Int8Linear(nn.Linear):
    """A frozen ``nn.Linear``: weight int8 [out, in], weight_scale [out, 1]; gradients flow to the input only."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None):
        """From what :func:`quantize_rows` gave, or a file holds."""
        super().__init__(codes.shape[1], codes.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """``linear`` quantized; its bias is copied."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*quantize_rows(linear.weight.detach()), bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Int8Matmul.apply(x, self.weight, self.weight_scale, self.bias)

    def dequantized(self) -> Tensor:
        """The weight it stands for, [out, in], in the scale's dtype."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale
