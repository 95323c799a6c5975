"""LPIPS with VGG-16 (arXiv 1801.03924): how unlike two images look to a network that was trained to tell what is on images."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from dedistill.errors import UserError, amount
from dedistill.io.weights import open_weights

SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""VGG-16's convolutions between its poolings, as its own numbers call them; after each slice images are compared."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's pixels, for pixels in [-1, 1]."""
LEAST = 1 << (len(SLICES) - 1)
"""Pixels of the shorter side, of which the poolings leave one."""
_MAKE = (
    "make it once where the package lpips is: safetensors.torch.save_file({k: v.clone() for k, v in "
    "lpips.LPIPS(net='vgg').state_dict().items()}, FILE)"
)


class Lpips(nn.Module):
    """Frozen, float32. Its weights are the state of the ``lpips`` package's own ``LPIPS(net="vgg")``, as safetensors."""

    def __init__(self, file: Path, source: str):
        """source: the recipe's key, for messages. Raises UserError for a file that is missing, cut, or another network's."""
        super().__init__()
        self.source = source
        self.layers = [[f"net.slice{i}.{n}" for n in layers] for i, layers in enumerate(SLICES, 1)]
        self.heads = [f"lin{i}.model.1.weight" for i in range(len(SLICES))]
        opened = open_weights(file, source)
        wanted = [f"{layer}.{part}" for slice in self.layers for layer in slice for part in ("weight", "bias")] + self.heads
        if missing := sorted(set(wanted) - set(opened.keys())):
            what = f"{amount(len(missing), 'tensor')} of LPIPS with VGG-16, e.g. {missing[0]}"
            raise UserError(f"{source}: '{file}' lacks {what}; {_MAKE}", 2)
        try:
            found = {name: opened.get_tensor(name).float() for name in wanted}
        except SafetensorError as e:
            raise UserError(f"{source}: '{file}' cannot be read: {e}", 2) from e
        for name, tensor in found.items():
            self.register_buffer(name.replace(".", "/"), tensor.clone(), persistent=False)
        for name, numbers in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(numbers).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """[B, 3, H, W] in about [-1, 1] -> distances [B]; 0 where they are alike. Raises UserError for sides below LEAST."""
        if min(images.shape[-2:]) < LEAST:
            raise UserError(f"{self.source}: images of {images.shape[-1]} x {images.shape[-2]} pixels; LPIPS needs {LEAST}", 2)
        total = images.new_zeros(len(images), dtype=torch.float32)
        for head, ours, theirs in zip(self.heads, self._seen(images), self._seen(others)):
            differences = (_unit(ours) - _unit(theirs)).square()
            total = total + F.conv2d(differences, self._weight(head)).mean((1, 2, 3))
        return total

    def _weight(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))

    def _seen(self, images: Tensor) -> Iterator[Tensor]:
        x = (images.float() - self._weight("shift")) / self._weight("scale")
        for i, layers in enumerate(self.layers):
            x = F.max_pool2d(x, 2) if i else x
            for layer in layers:
                x = F.relu(F.conv2d(x, self._weight(f"{layer}.weight"), self._weight(f"{layer}.bias"), padding=1))
            yield x


def _unit(features: Tensor) -> Tensor:
    """Of length 1 at every place. Clamped before the root, whose slope at 0 is infinite."""
    return features / (features.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10)
