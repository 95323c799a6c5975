"""Named sets of layers of any network with FLUX's blocks, whatever its depth."""

from torch import nn

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
EDGE, FULL_DOUBLE, FULL_SINGLE = 8, 19, 38  # of FLUX.1, whose 19 double and 38 single blocks set the scale


def presets(net: nn.Module) -> dict[str, list[str]]:
    """Preset name -> name patterns of linears; no linear is matched by two patterns of one preset.

    modulation, attention and mlp share out the linears of all blocks; blocks is all of them. edges: the blocks that
    read the input and write the output, the first 8 of 19 double and the last 8 of 38 single blocks, in the same
    proportion at other depths, at least one of each. libreflux: all double blocks, the last half of the single blocks
    (rounded up) and the modulation of the others.
    """
    doubles, singles = len(net.transformer_blocks), len(net.single_transformer_blocks)
    half, first, last = singles // 2, _edge(doubles, FULL_DOUBLE), _edge(singles, FULL_SINGLE)
    double, single = f"{DOUBLE}.*", f"{SINGLE}.*"
    return {
        "modulation": [f"{double}.norm1.linear", f"{double}.norm1_context.linear", f"{single}.norm.linear"],
        "attention": [
            *(f"{double}.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj")),
            *(f"{double}.attn.{n}" for n in ("add_v_proj", "to_add_out")),
            *(f"{single}.attn.{n}" for n in ("to_q", "to_k", "to_v")),
        ],
        "mlp": [
            *(f"{double}.{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")),
            f"{single}.proj_mlp",
            f"{single}.proj_out",
        ],
        "blocks": [f"{double}.**", f"{single}.**"],
        "edges": [
            *(f"{DOUBLE}.{i}.**" for i in range(first)),
            *(f"{SINGLE}.{i}.**" for i in range(singles - last, singles)),
        ],
        "libreflux": [
            f"{double}.**",
            *(f"{SINGLE}.{i}.norm.linear" for i in range(half)),
            *(f"{SINGLE}.{i}.**" for i in range(half, singles)),
        ],
    }


def _edge(count: int, full: int) -> int:
    return min(count, max(1, round(count * EDGE / full)))
