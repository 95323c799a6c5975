"""The named sets of layers on networks of FLUX's real sizes, which exist only as shapes (meta device)."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_recipes import adapter_table

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import adaptable, count_parameters, resolve_targets
from dedistill.models.flux.naming import presets
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import linear_names


@pytest.fixture(scope="module")
def schnell():
    with torch.device("meta"):
        return FluxTransformer2DModel()


def resolve(denoiser, *targets: dict, kind: str = "lokr"):
    table = adapter_table(kind, *targets)
    return resolve_targets(table, adaptable(denoiser), presets(denoiser))


def test_size_of_schnell(schnell):
    """Parameters and linears of FLUX.1-schnell."""
    assert sum(p.numel() for p in schnell.parameters()) == 11_891_178_560
    assert len(linear_names(schnell)) == 502


def test_linears_of_each_set(schnell):
    """Modulation is two linears in each of 19 double blocks and one in each of 38 single ones."""
    counts = {name: len(resolve(schnell, {"preset": name})) for name in presets(schnell)}
    # 14 linears in a double block, 6 in a single one
    half = 19 * 14 + 19 * 6 + 19
    edges = 8 * 14 + 8 * 6
    wanted = {"modulation": 19 * 2 + 38, "attention": 19 * 8 + 38 * 3, "mlp": 19 * 4 + 38 * 2, "blocks": 494}
    assert counts == wanted | {"edges": edges, "libreflux": half}


@pytest.mark.parametrize(
    ("factor", "millions"),
    [(1, 11_833), (2, 2959), (3, 1315), (4, 739.6), (6, 328.7), (8, 184.9), (10, 173.7), (16, 46.4), (-1, 4.7)],
)
def test_sizes_of_lokr_on_all_blocks(schnell, factor, millions):
    """LoKr on all 494 linears of the blocks."""
    found = resolve(schnell, {"preset": "blocks", "factor": factor})
    assert count_parameters(found, "lokr") / 1e6 == pytest.approx(millions, rel=1e-3, abs=0.05)


@pytest.mark.parametrize(("preset", "factor", "millions"), [("libreflux", 4, 605.2), ("modulation", 1, 3227.5)])
def test_the_two_published_sizes(schnell, preset, factor, millions):
    """600 M and 3.2 B, by the real adapter and by the count."""
    targets = resolve(schnell, {"preset": preset, "factor": factor})
    with torch.device("meta"):
        adapter = Adapter(schnell, "lokr", targets)
    adapter.detach_from_base()
    built = sum(p.numel() for p in adapter.parameters())
    assert built == count_parameters(targets, "lokr")
    assert built / 1e6 == pytest.approx(millions, abs=0.05)


def test_edges_and_modulation(schnell):
    """Edges at factor 1 with all modulation at factor 2 are 3.52 B; the first target wins where both match."""
    targets = resolve(schnell, {"preset": "modulation", "factor": 2}, {"preset": "edges", "factor": 1})
    assert count_parameters(targets, "lokr") / 1e9 == pytest.approx(3.52, abs=0.005)


FORMS = [
    ("lokr", {"factor": 4}),
    ("lokr", {"factor": -1}),
    ("lokr", {"factor": 5}),
    ("lokr", {"factor": 2, "rank": 3}),
    ("lora", {"rank": 4}),
]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_count_is_the_adapters_own(kind, form):
    """The count without building equals what LyCORIS builds, whatever the form."""
    denoiser = PixelFlux().tiny(0).denoiser
    targets = resolve(denoiser, {"preset": "blocks", **form}, kind=kind)
    assert count_parameters(targets, kind) == sum(p.numel() for p in Adapter(denoiser, kind, targets).parameters())


@pytest.mark.parametrize(
    ("doubles", "singles", "first", "whole"),
    [(8, 38, [0, 1, 2], range(19, 38)), (19, 38, range(8), range(19, 38)), (4, 5, [0, 1], [2, 3, 4]), (1, 1, [0], [0])],
)
def test_pruned_networks_get_their_own_halves_and_edges(doubles, singles, first, whole):
    """Flex.1 has 8 double blocks; sets follow the depth of the network at hand."""
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(
            num_layers=doubles,
            num_single_layers=singles,
            num_attention_heads=1,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    names = {preset: {r.name for r in resolve(denoiser, {"preset": preset})} for preset in presets(denoiser)}
    blocks = lambda preset, kind: {int(n.split(".")[1]) for n in names[preset] if n.split(".")[0] == kind}  # noqa: E731
    assert blocks("edges", "transformer_blocks") == set(first)
    last = round(singles * 8 / 38) or 1
    assert blocks("edges", "single_transformer_blocks") == set(range(singles - last, singles))
    assert blocks("libreflux", "transformer_blocks") == set(range(doubles))
    assert {int(n.split(".")[1]) for n in names["libreflux"] if n.endswith("proj_mlp")} == set(whole)
    assert names["modulation"] < names["libreflux"] < names["blocks"] or singles == 1
