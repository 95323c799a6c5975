"""Floating-point operations of FLUX-shaped networks in closed form; a multiply and an add are two.

L and A are the linears' and attention's forward operations. On a frozen base a training step needs 2 L (forward, and the
gradient of the input) + 3 A (forward, and two gradients); recomputation, padding and dequantization are not counted, so
they show as lost utilization.
"""

from dataclasses import dataclass

from torch import nn

from dedistill.adapters.targets import Resolved, adaptable, factor_sides

TEXT_LINEARS = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "context_embedder"}


@dataclass(frozen=True)
class Tokens:
    """Real tokens of one sample."""

    image: int
    text: int

    def through(self, linear: str) -> int:
        """Rows per sample that the linear of that name sees."""
        parts = linear.split(".")
        if parts[0] == "time_text_embed" or any(p.startswith("norm") for p in parts):  # modulation works per sample
            return 1
        if parts[0] == "single_transformer_blocks":
            return self.image + self.text
        return self.text if TEXT_LINEARS & set(parts) else self.image


def forward_flops(denoiser: nn.Module, tokens: Tokens) -> tuple[int, int]:
    """(L, A) of one sample: linears, and scores and sums of attention over image and text together."""
    shapes = adaptable(denoiser)
    linears = sum(2 * out * in_ * tokens.through(name) for name, (out, in_) in shapes.items())
    blocks = len(denoiser.transformer_blocks) + len(denoiser.single_transformer_blocks)
    return linears, 4 * (tokens.image + tokens.text) ** 2 * denoiser.inner_dim * blocks


def model_flops(denoiser: nn.Module, tokens: Tokens) -> int:
    """2 L + 3 A of one sample: what a training step on the frozen base alone takes."""
    linears, attention = forward_flops(denoiser, tokens)
    return 2 * linears + 3 * attention


def adapter_flops(targets: list[Resolved], kind: str, tokens: Tokens) -> int:
    """What the factored adapter adds to a training step of one sample: each of its matmuls three times."""
    return sum(6 * tokens.through(t.name) * _weights_met(t, kind) for t in targets)


def _weights_met(target: Resolved, kind: str) -> int:
    """Multiply-adds of one row through one layer's factors, the large LoKr factor first."""
    out, in_ = target.shape
    if kind == "lora":
        return target.rank * (out + in_)
    (small_out, large_out), (small_in, large_in) = factor_sides(out, target.factor), factor_sides(in_, target.factor)
    large = large_out * large_in if target.rank is None else target.rank * (large_out + large_in)
    return small_in * large + large_out * small_in * small_out
