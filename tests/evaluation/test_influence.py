"""Layer influence: known distances, known rankings, and a recipe that trains what the budget allows."""

import json
import math
import tomllib

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from dedistill.adapters.targets import adaptable, count_parameters, resolve_targets
from dedistill.errors import UserError
from dedistill.evaluation.influence import (
    FACTORS,
    Influence,
    Meter,
    angular_distance,
    measure,
    recipe_fragment,
    share_out,
    usual_budget,
)
from dedistill.flow import keyed
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import Model, build_model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.recipe import load_recipe
from dedistill.recipe.model_tables import Adapter, Architecture
from dedistill.report.influence import all_alike, write_influence
from dedistill.runs.model import open_base

PROMPTS = ["3 seven", "one", "a very long caption of many words", "5"]
SIZES = {"height": 8, "width": 16, "patch": 4, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6], "text_dim": 16}


class Negate(nn.Module):
    """A block that turns both streams round."""

    def forward(self, hidden_states, encoder_hidden_states, **_):
        return -encoder_hidden_states, -hidden_states


def network(mask: str = "bool", **sizes) -> Model:
    """Three double and three single blocks with random weights."""
    family = PixelFlux()
    new = Architecture(layers=3, single_layers=3, pooled_dim=16, **SIZES | sizes)
    components = family.build(new, mask=mask)
    return Model(family, components, components.denoiser, text_length=12)


def make_identity(block: nn.Module) -> None:
    """Gates of zero leave the residual alone."""
    for name, linear in block.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("norm"):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


@pytest.mark.parametrize("degrees", [0, 1e-6, 0.5, 45, 60, 90, 135, 179.5, 180])
def test_angle_of_two_known_directions(degrees):
    """The distance is the angle as a share of 180 degrees, whatever the lengths, exact at both ends."""
    angle = math.radians(degrees)
    a = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    b = 0.1 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    torch.testing.assert_close(angular_distance(a, b)[0].item(), degrees / 180, rtol=1e-9, atol=1e-12)


def test_angle_equals_the_formula_of_the_paper():
    """Arccos of the cosine similarity over pi."""
    a, b = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.nn.functional.cosine_similarity(a, b).arccos() / torch.pi
    torch.testing.assert_close(angular_distance(a, b), wanted)


def test_a_state_that_stays_nought_has_not_turned():
    """No angle exists there, and no change either."""
    assert angular_distance(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_identity_is_0_and_negation_1(kind):
    """In either kind of block, in both streams, at every sigma; the others are strictly between."""
    model = network()
    blocks = getattr(model.components.denoiser, kind)
    make_identity(blocks[0])
    blocks[1] = Negate()
    found = measure(model, PROMPTS, sigmas=3, batch=2)
    distance = dict(zip(found.blocks, found.distance))
    assert (distance.pop(f"{kind}.0") == 0).all()
    assert (distance.pop(f"{kind}.1") == 1).all()
    assert len(distance) == 4 and all((d > 0).all() and (d < 1).all() for d in distance.values())


def test_ranks_a_random_block_first_and_an_identity_block_last():
    model = network()
    denoiser = model.components.denoiser
    for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
        block.requires_grad_(False)
        for parameter in block.parameters():
            parameter.mul_(0.3)
    make_identity(denoiser.transformer_blocks[2])
    wild = denoiser.single_transformer_blocks[1]
    generator = torch.Generator().manual_seed(0)
    for parameter in wild.parameters():
        parameter.normal_(generator=generator)
    influence = measure(model, PROMPTS, sigmas=2, batch=4).per_block()
    ranked = sorted(influence, key=influence.get)
    assert ranked[0] == "transformer_blocks.2" and ranked[-1] == "single_transformer_blocks.1"


def test_batches_do_not_matter_so_padding_does_not():
    """Captions of 2 to 8 tokens, each alone without padding or all together with it, give the same means."""
    model = network()
    together, alone = (measure(model, PROMPTS, sigmas=2, batch=batch) for batch in (4, 1))
    torch.testing.assert_close(together.distance, alone.distance, rtol=1e-4, atol=1e-6)
    assert together.prompts == 4 and together.sigmas == [1.0, 0.5]


def test_padding_that_takes_part_in_attention_is_not_averaged():
    """Where nothing masks the padding, its own turning still does not count."""
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    sums = []
    for fill in (0.0, 9.0):

        class Block(nn.Module):
            def forward(self, hidden_states, encoder_hidden_states, fill=fill):
                padding = torch.full_like(encoder_hidden_states, fill)
                return torch.where(mask[..., None], encoder_hidden_states.flip(-1), padding), hidden_states

        block = Block()
        meter = Meter(PixelFlux(), [block], 1)
        with meter.watch(0, Conditioning.of(states, mask)):
            block(hidden_states=states, encoder_hidden_states=states)
        sums.append(torch.stack(list(meter.sums.values())))
    assert torch.equal(*sums)
    rows = [angular_distance(s[m], s[m].flip(-1)).mean() for s, m in zip(states, mask)]
    assert sums[0].flatten().tolist() == pytest.approx([0, float(sum(rows))])


def test_hooks_are_gone_afterwards():
    model = network()
    measure(model, PROMPTS[:1], sigmas=1, batch=1)
    assert not any(module._forward_hooks for module in model.components.denoiser.modules())
    assert model.root.training


def test_states_that_are_not_finite_are_an_error():
    """A ranking of NaN would silently favour whatever sorts first."""
    model = network()
    with torch.no_grad():
        model.components.denoiser.single_transformer_blocks[1].proj_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"hidden states of single_transformer_blocks\.1 are not finite at sigma 1"):
        measure(model, PROMPTS[:1], sigmas=1, batch=1)


SHAPES = {f"b.{i}.{part}": (64, 64) for i in range(4) for part in ("to_q", "proj")} | {"outside": (64, 64)}
BLOCKS = {f"b.{i}": value for i, value in enumerate((0.1, 0.4, 0.0, 0.2))}


def count(factors: dict[str, int]) -> int:
    targets = [{"pattern": f"{block}.**", "factor": factor} for block, factor in factors.items()]
    return count_parameters(resolve_targets(Adapter(kind="lokr", targets=targets), SHAPES, {}), "lokr")


@pytest.mark.parametrize("budget", [2_200, 3_000, 8_000, 12_000, 25_000, 10**6])
def test_factors_follow_influence_within_the_budget(budget):
    """The count is the adapter's own, never above the budget, and more influence never gets a larger factor."""
    factors, used = share_out(BLOCKS, SHAPES, budget)
    assert used == count(factors) <= budget
    ranked = sorted(BLOCKS, key=BLOCKS.get, reverse=True)
    assert [factors[b] for b in ranked] == sorted(factors.values())
    spare = budget - used
    for block, factor in factors.items():  # nothing that fits is left undone
        if factor > 1:
            assert count(factors | {block: FACTORS[FACTORS.index(factor) + 1]}) - used > spare


def test_enough_for_everything_is_factor_1_everywhere():
    factors, used = share_out(BLOCKS, SHAPES, 10**9)
    assert set(factors.values()) == {1} and used == 8 * (64 * 64 + 1)


def test_the_usual_budget_leaves_something_to_share_out():
    full = count(share_out(BLOCKS, SHAPES, 10**9)[0])
    budget = usual_budget(BLOCKS, SHAPES)
    factors, used = share_out(BLOCKS, SHAPES, budget)
    assert full // 4 < used <= budget < full and len(set(factors.values())) > 1 and not all_alike(factors)
    assert "smaller --budget" in all_alike(share_out(BLOCKS, SHAPES, full)[0])
    wide = {name: (shape[0] * 1000, shape[1] * 1000) for name, shape in SHAPES.items()}
    assert usual_budget(BLOCKS, wide) == 600_000_000


def test_too_small_a_budget_says_what_the_least_is():
    with pytest.raises(UserError, match="--budget: 100 is too small: factor 16 on every block takes 2,"):
        share_out(BLOCKS, SHAPES, 100)


@pytest.mark.parametrize("budget", [100_000_000, 600_000_000, 3_200_000_000])
def test_budgets_of_flux_are_used_up(budget):
    """At the depth of FLUX.1 at least 98 % of a budget is given out, whatever the ranking."""
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel()
    blocks = [name for name, module in denoiser.named_modules() if name.rpartition(".")[0].endswith("transformer_blocks")]
    influence = dict(zip(blocks, keyed.generator(0, "test").uniform(0.02, 0.4, 57)))
    used = share_out(influence, adaptable(denoiser), budget)[1]
    assert len(blocks) == 57 and 0.98 * budget <= used <= budget


def test_a_recipe_extends_the_fragment(tmp_path, adapter_recipe, base_model):
    """Targets of the fragment replace the measured recipe's own; the adapter built has the promised size."""
    PixelFlux().save(network().components, tmp_path / "deeper")
    adapter_recipe.write_text(adapter_recipe.read_text().replace(str(base_model), str(tmp_path / "deeper")))
    recipe = load_recipe(adapter_recipe)
    model = open_base(recipe)
    found = measure(model, PROMPTS, sigmas=2, batch=4)
    budget = 20_000
    factors, used = share_out(found.per_block(), adaptable(model.components.denoiser), budget)
    out = tmp_path / "elsewhere" / "influence"
    write_influence(out, found, factors, used, budget, str(adapter_recipe))

    mine = tmp_path / "mine.toml"
    mine.write_text(f'extends = "elsewhere/influence/influence.toml"\n[run]\nname = "mine"\nout = "{tmp_path}/mine"\n')
    loaded = load_recipe(mine)
    assert loaded.train == recipe.train and loaded.adapter.init == recipe.adapter.init
    assert [t.pattern for t in loaded.adapter.targets] == [f"{block}.**" for block in found.blocks]
    built = sum(p.numel() for p in build_model(loaded).trainable().values())
    assert 0.9 * budget <= built == used <= budget
    numbers = json.loads((out / "influence.json").read_text())
    assert numbers["parameters"] == used and {b["name"]: b["factor"] for b in numbers["blocks"]} == factors
    assert numbers["blocks"][0]["text"] == pytest.approx(found.distance[0, 1].tolist())


def test_names_in_a_fragment_are_quoted():
    """A TOML key or path may hold anything."""
    data = tomllib.loads(recipe_fragment({"a.0": 2}, 'odd "folder"/r.toml', "note"))
    assert data["extends"] == 'odd "folder"/r.toml'
    assert data["adapter"]["targets"] == [{"pattern": "a.0.**", "factor": 2}]


def test_the_page_shows_every_number(tmp_path):
    """Every block, stream and sigma has its cell, with its value as text beside the colour."""
    distance = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Influence(["b.0", "b.1", "b.2"], ["image", "text"], [1.0, 0.75, 0.5, 0.25], distance, 5)
    page = write_influence(tmp_path, found, {"b.0": 1, "b.1": 16, "b.2": 4}, 90, 100, str(tmp_path / "r.toml")).read_text()
    cells = [f">{value:.3f}</td>" for value in distance.flatten().tolist()]
    assert all(cell in page for cell in cells) and page.count('<td class="cell') == 24
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_recipe_of_the_package_is_extended_by_its_name(tmp_path):
    found = Influence(["b.0"], ["image", "text"], [1.0], torch.rand(1, 2, 1, dtype=torch.float64), 5)
    write_influence(tmp_path / "deep", found, {"b.0": 2}, 90, 100, "dedistill:digits/dedistill")
    assert load_recipe(tmp_path / "deep/influence.toml").adapter.targets[0].factor == 2
