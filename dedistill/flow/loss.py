"""The flow-matching loss, one number per sample."""

from torch import Tensor


def flow_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over each sample's elements, in float32: [B, ...] -> [B] (arXiv 2210.02747, eq. 9)."""
    if predicted.shape != target.shape:
        raise ValueError(f"prediction {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
