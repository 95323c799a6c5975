"""Which linears a list of targets names, in what form, and what is said when it makes no sense."""

import itertools

import pytest
from lycoris.functional import factorization as of_lycoris
from peft.tuners.lokr.layer import factorization as of_peft
from tiny_recipes import adapter_table

from dedistill.adapters.programs import peft_sides
from dedistill.adapters.targets import Resolved, adaptable, factor_sides, resolve_targets
from dedistill.errors import UserError
from dedistill.models.pixel_flux.family import PixelFlux

SHAPES = {
    "x_embedder": (32, 16),
    "transformer_blocks.1.attn.to_q": (32, 32),
    "transformer_blocks.1.attn.to_out.0": (32, 32),
    "transformer_blocks.1.norm1.linear": (192, 32),
    "transformer_blocks.10.attn.to_q": (32, 32),
    "transformer_blocks.18.norm1.linear": (192, 32),
    "single_transformer_blocks.1.attn.to_q": (32, 32),
    "single_transformer_blocks.1.norm.linear": (96, 32),
}
PRESETS = {
    "modulation": ["transformer_blocks.*.norm1.linear", "single_transformer_blocks.*.norm.linear"],
    "elsewhere": ["layers.*.to_q"],
}


def resolve(*targets: dict, kind: str = "lokr") -> list[Resolved]:
    return resolve_targets(adapter_table(kind, *targets), SHAPES, PRESETS, lambda key: f"recipe.toml:7: {key}")


def names(*targets: dict) -> list[str]:
    return [r.name for r in resolve(*targets)]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("transformer_blocks.1.**", ["attn.to_q", "attn.to_out.0", "norm1.linear"]),
        ("transformer_blocks.1.attn.*", ["attn.to_q"]),
        ("transformer_blocks.1.attn.**", ["attn.to_q", "attn.to_out.0"]),
        ("transformer_blocks.1.*.to_q", ["attn.to_q"]),
        ("transformer_blocks.1.attn.to_*.0", ["attn.to_out.0"]),
    ],
)
def test_patterns_take_what_they_say_and_no_prefixes(pattern, wanted):
    """Block 1 is neither block 10 nor 18, and no single-stream block."""
    assert names({"pattern": pattern}) == [f"transformer_blocks.1.{w}" for w in wanted]


@pytest.mark.parametrize("pattern", ["transformer_blocks.1", "transformer_blocks", "*.to_q", "ransformer_blocks.1.attn.to_q"])
def test_a_part_of_a_name_is_not_the_name(pattern):
    """Neither a prefix nor a suffix is enough."""
    with pytest.raises(UserError, match="matches no linear"):
        resolve({"pattern": pattern})


def test_result_is_in_network_order_not_in_order_of_targets():
    """Precedence is decided by the recipe's order, the list follows the network."""
    targets = {"pattern": "single_transformer_blocks.**"}, {"pattern": "x_embedder"}, {"pattern": "transformer_blocks.**"}
    assert names(*targets) == list(SHAPES)


def test_first_target_wins_whatever_is_more_specific():
    """Of two targets that match a name, the first decides factor, rank and label."""
    wide, narrow = {"pattern": "**.to_q", "factor": 2}, {"pattern": "transformer_blocks.1.**", "factor": 8, "rank": 3}
    form = {r.name: (r.factor, r.rank, r.pattern) for r in resolve(wide, narrow)}
    assert form["transformer_blocks.1.attn.to_q"] == (2, None, "**.to_q")
    assert form["transformer_blocks.1.attn.to_out.0"] == (8, 3, "transformer_blocks.1.**")
    form = {r.name: (r.factor, r.rank, r.pattern) for r in resolve(narrow, wide)}
    assert form["transformer_blocks.1.attn.to_q"] == (8, 3, "transformer_blocks.1.**")
    assert form["transformer_blocks.10.attn.to_q"] == (2, None, "**.to_q")
    assert len(form) == 5


@pytest.mark.parametrize(
    ("kind", "target", "wanted"),
    [
        ("lokr", {}, (4, None)),
        ("lokr", {"rank": "full"}, (4, None)),
        ("lokr", {"factor": 16}, (16, None)),
        ("lokr", {"factor": -1}, (-1, None)),
        ("lokr", {"rank": 3}, (4, 3)),
        ("lokr", {"factor": 8, "rank": 1}, (8, 1)),
        ("lora", {}, (None, 16)),
        ("lora", {"rank": 5}, (None, 5)),
    ],
)
def test_factor_and_rank_and_their_defaults(kind, target, wanted):
    """LoKr is a full matrix of factor 4 unless told otherwise, LoRA has rank 16."""
    (found,) = resolve({"pattern": "x_embedder", **target}, kind=kind)
    assert (found.factor, found.rank) == wanted
    assert found.shape == SHAPES["x_embedder"]


def test_a_preset_is_the_union_of_its_patterns():
    """A preset adds the layers of all its patterns, under the preset's name."""
    modulation = ["transformer_blocks.1.norm1.linear", "transformer_blocks.18.norm1.linear"]
    assert names({"preset": "modulation"}) == [*modulation, "single_transformer_blocks.1.norm.linear"]
    assert {r.pattern for r in resolve({"preset": "modulation"})} == {"modulation"}


@pytest.mark.parametrize(
    ("targets", "place", "message"),
    [
        ([{"pattern": "layers.**"}], "adapter.targets.0.pattern", "'layers.**' matches no linear"),
        ([{"preset": "elsewhere"}], "adapter.targets.0.preset", "'elsewhere' matches no linear"),
        ([{"preset": "modulatoin"}], "adapter.targets.0.preset", "unknown preset 'modulatoin'"),
        ([{"pattern": "blocks**.to_q"}], "adapter.targets.0.pattern", "** stands alone between dots"),
        ([{"pattern": "x_embedder"}, {"pattern": "to_*"}], "adapter.targets.1.pattern", "'to_*' matches no linear"),
        ([{"pattern": "**"}, {"preset": "modulation"}], "adapter.targets.1.preset", "took all 3 of its layers"),
        ([{"pattern": "**.to_q"}, {"pattern": "**.to_q"}], "adapter.targets.1.pattern", "took all 3 of its layers"),
    ],
)
def test_senseless_targets_are_refused_by_place(targets, place, message):
    """A target that adds nothing is an error of the recipe, told with its place and a way out."""
    with pytest.raises(UserError) as caught:
        resolve(*targets)
    assert str(caught.value).startswith(f"recipe.toml:7: {place}: ")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_errors_show_names_to_choose_from():
    """Who misspelt a name needs to see some real ones, who misspelt a preset all of them."""
    with pytest.raises(UserError) as caught:
        resolve({"pattern": "to_q"})
    shown = str(caught.value).partition("some names: ")[2].split(", ")
    assert len(shown) == 4 and set(shown) <= SHAPES.keys()
    with pytest.raises(UserError, match="this family has modulation, elsewhere"):
        resolve({"preset": "norms"})


def test_presets_of_the_real_network_are_disjoint_and_complete():
    """Every pattern of the family finds layers of today's diffusers; three kinds make up the blocks."""
    denoiser = PixelFlux().tiny(0).denoiser
    shapes = adaptable(denoiser)
    found, presets = {}, PixelFlux().presets(denoiser)
    for preset, patterns in presets.items():
        for pattern in patterns:
            assert resolve_targets(adapter_table("lokr", {"pattern": pattern}), shapes, {}), pattern
        found[preset] = {r.name for r in resolve_targets(adapter_table("lokr", {"preset": preset}), shapes, presets)}
    assert found["blocks"] == {n for n in shapes if "transformer_blocks." in n}
    assert found["modulation"] | found["attention"] | found["mlp"] == found["blocks"]
    assert sum(len(found[p]) for p in ("modulation", "attention", "mlp")) == len(found["blocks"]) == 20


def one_layer(kind, factor, rank):
    table = adapter_table(kind, {"pattern": "a", "factor": factor, "rank": rank})
    return resolve_targets(table, {"a": (64, 32)}, {})[0]


def test_a_lora_larger_than_its_layer_is_refused():
    """A rank of 100,000 on every layer would fill the memory before anything is said."""
    assert one_layer("lora", None, 32).rank == 32
    with pytest.raises(UserError, match=r"adapter\.targets\.0\.rank: 33 is more than 'a' has, 64 x 32: at most 32"):
        one_layer("lora", None, 33)


@pytest.mark.parametrize(("factor", "rank", "wanted"), [(4, 7, 7), (4, 8, None), (8, 3, 3), (8, 4, None), (-1, 4, None)])
def test_a_lokr_rank_that_saves_nothing_is_resolved_as_full(factor, rank, wanted):
    """LyCORIS makes the factor a full matrix there; the printed table must not say otherwise."""
    assert one_layer("lokr", factor, rank).rank == wanted


def test_sides_are_those_of_lycoris_and_of_peft():
    sizes = [*range(1, 200), 768, 1152, 1536, 3072, 12288, 18432, 21504]
    for size, factor in itertools.product(sizes, (-1, 1, 2, 3, 4, 7, 8, 12, 16, 64, 256)):
        assert factor_sides(size, factor) == of_lycoris(size, factor), (size, factor)
        assert peft_sides(size, factor) == of_peft(size, factor), (size, factor)
