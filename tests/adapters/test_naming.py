"""Adapters as other programs write them, read as the change of weight that those programs apply."""

import pytest
import torch
from test_formats import WIDTH, adapted, flux

from dedistill.adapters.delta import weight_change
from dedistill.adapters.formats import as_kohya, as_lycoris, as_peft, as_transformer, by_layer, check_shapes
from dedistill.errors import UserError
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.quantize import linear_names

D = WIDTH
NETWORK = flux(guidance=True)
SHAPES = {n: tuple(NETWORK.get_submodule(n).weight.shape) for n in linear_names(NETWORK)}
ATTN = "transformer_blocks.1.attn"
SINGLE = "single_transformer_blocks.2"
FUSED = {
    "double_blocks.1.img_attn.qkv": [f"{ATTN}.to_q", f"{ATTN}.to_k", f"{ATTN}.to_v"],
    "double_blocks.1.txt_attn.qkv": [f"{ATTN}.add_q_proj", f"{ATTN}.add_k_proj", f"{ATTN}.add_v_proj"],
    "double_blocks.1.img_attn.proj": [f"{ATTN}.to_out.0"],
    "double_blocks.1.txt_attn.proj": [f"{ATTN}.to_add_out"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.2.linear1": [f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"],
    "single_blocks.2.linear2": [f"{SINGLE}.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    "img_in": ["x_embedder"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
}
"""Module of Black Forest Labs' network -> the layers of diffusers' in it, by its rows."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def size(module: str) -> tuple[int, int]:
    return sum(SHAPES[n][0] for n in FUSED[module]), SHAPES[FUSED[module][0]][1]


def wanted(changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Change of each of diffusers' layers, from those of the fused ones."""
    found = {}
    for module, change in changes.items():
        found |= zip(FUSED[module], change.split([SHAPES[n][0] for n in FUSED[module]][: len(FUSED[module])]))
    return found


def read(tensors: dict, **options) -> dict[str, torch.Tensor]:
    layers = by_layer(tensors, SHAPES, "my.safetensors", naming=naming, **options)
    assert all(weight_change(f).shape == SHAPES[n] for n, f in layers.items())
    return {n: weight_change(f) for n, f in layers.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


UP_DOWN, A_B, DEFAULT = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
)
OLD = ("lora.up.weight", "lora.down.weight")
FLAT = lambda prefix: lambda name: prefix + name.replace(".", "_")  # noqa: E731
DOTTED = lambda prefix: lambda name: prefix + name  # noqa: E731


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize(
    ("name", "factors"),
    [
        (FLAT("lora_unet_"), UP_DOWN),  # kohya, OneTrainer's KOHYA
        (DOTTED("diffusion_model."), UP_DOWN),
        (DOTTED("diffusion_model."), A_B),  # OneTrainer's COMFY, ai-toolkit
        (DOTTED(""), A_B),  # OneTrainer's ORIGINAL
        (DOTTED("model.diffusion_model."), UP_DOWN),
        (DOTTED("base_model.model."), A_B),  # fal
        (DOTTED("base_model.model."), DEFAULT),
    ],
    ids=range(7),
)
def test_lora_of_the_fused_layers(name, factors, alpha):
    tensors, changes = {}, {}
    for i, module in enumerate(FUSED):
        rows, columns = size(module)
        up, down = normal(rows, 3, seed=i), normal(3, columns, seed=-i - 1)
        tensors |= {f"{name(module)}.{factors[0]}": up, f"{name(module)}.{factors[1]}": down}
        if alpha is not None:
            tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
        changes[module] = up @ down * (1 if alpha is None else alpha / 3)
    assert_same(read(tensors), wanted(changes))


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize(
    ("name", "factors"),
    [
        (FLAT("lycoris_"), UP_DOWN),
        (FLAT("lora_transformer_"), UP_DOWN),  # OneTrainer's LEGACY
        (DOTTED("transformer."), UP_DOWN),
        (DOTTED("transformer."), A_B),  # ai-toolkit, OneTrainer's DIFFUSERS
        (DOTTED("transformer."), OLD),
        (DOTTED("diffusion_model."), A_B),
        (DOTTED("base_model.model."), A_B),  # PEFT
        (DOTTED("base_model.model.transformer."), DEFAULT),
        (DOTTED(""), A_B),  # save_lora_adapter of a network
    ],
    ids=range(9),
)
def test_lora_of_the_networks_own_layers(name, factors, alpha):
    tensors, changes = {}, {}
    for i, (linear, (rows, columns)) in enumerate(SHAPES.items()):
        up, down = normal(rows, 4, seed=i), normal(4, columns, seed=-i - 1)
        tensors |= {f"{name(linear)}.{factors[0]}": up, f"{name(linear)}.{factors[1]}": down}
        if alpha is not None:
            tensors[f"{name(linear)}.alpha"] = torch.tensor(alpha)
        changes[linear] = up @ down * (1 if alpha is None else alpha / 4)
    assert_same(read(tensors), changes)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_processors(prefix):
    """Two streams of a double block are numbered 1 (image) and 2 (text); a single block's qkv are the first rows of linear1."""
    names = {
        "double_blocks.1.processor.qkv_lora1": FUSED["double_blocks.1.img_attn.qkv"],
        "double_blocks.1.processor.qkv_lora2": FUSED["double_blocks.1.txt_attn.qkv"],
        "double_blocks.1.processor.proj_lora1": FUSED["double_blocks.1.img_attn.proj"],
        "double_blocks.1.processor.proj_lora2": FUSED["double_blocks.1.txt_attn.proj"],
        "single_blocks.2.processor.qkv_lora": FUSED["single_blocks.2.linear1"][:3],
        "single_blocks.2.processor.proj_lora": FUSED["single_blocks.2.linear2"],
    }
    tensors, expected = {}, {}
    for i, (name, parts) in enumerate(names.items()):
        rows = [SHAPES[n][0] for n in parts]
        up, down = normal(sum(rows), 2, seed=i), normal(2, SHAPES[parts[0]][1], seed=i + 50)
        tensors |= {f"{prefix}{name}.up.weight": up, f"{prefix}{name}.down.weight": down}
        expected |= zip(parts, (up @ down).split(rows))
    assert_same(read(tensors), expected)


def test_the_last_modulation_has_its_halves_in_the_other_order():
    up, down = normal(2 * D, 2), normal(2, D, seed=1)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    found = read({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    assert_same(found, {"norm_out.linear": torch.cat([up[D:], up[:D]]) @ down})
    w1, w2 = normal(1, 4), normal(2 * D, D // 4, seed=1)  # one row of blocks, which the halves cut through
    found = read({"diffusion_model.final_layer.adaLN_modulation.1.lokr_w1": w1, f"{name}.lokr_w2": w2})
    whole = torch.kron(w1, w2)
    assert_same(found, {"norm_out.linear": torch.cat([whole[D:], whole[:D]])})


@pytest.mark.parametrize("height", [3, 6, 4, 1])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", [FLAT("lora_unet_"), DOTTED("diffusion_model.")])
def test_lokr_of_a_fused_layer(name, low, height):
    """Also where its blocks of rows do not end where q, k and v do: then the change is right, and no other format holds it."""
    module = "double_blocks.1.img_attn.qkv"
    w1, w2 = normal(height, 4), normal(3 * D // height, D // 4, seed=1)
    tensors = {f"{name(module)}.lokr_w1": w1, f"{name(module)}.lokr_w2": w2, f"{name(module)}.alpha": torch.tensor(9.0)}
    scale = 1.0
    if low:
        a, b, c, d = normal(height, 2), normal(2, 4, seed=2), normal(3 * D // height, 2, seed=3), normal(2, D // 4, seed=4)
        w1, w2, scale = a @ b, c @ d, 9 / 2
        factors = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d, "alpha": torch.tensor(9.0)}
        tensors = {f"{name(module)}.{factor}": tensor for factor, tensor in factors.items()}
    assert_same(read(tensors), wanted({module: torch.kron(w1, w2) * scale}))
    layers = by_layer(tensors, SHAPES, "x", naming=naming)
    if height % 3:
        for write in (as_lycoris, as_transformer):
            with pytest.raises(UserError, match=r"to_q' is part of a LoKr of a fused layer .* dedistill merge"):
                write(layers)
    else:
        assert_same(read(as_transformer(layers)), wanted({module: torch.kron(w1, w2) * scale}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool])
@pytest.mark.parametrize("prefix", ["lora_unet_double_blocks_1_img_attn_qkv", "diffusion_model.double_blocks.1.img_attn.qkv"])
def test_dtypes_that_nobody_computes_in(prefix, dtype):
    """They are read as the numbers that they are, and written in a dtype that holds these."""
    up, down = (normal(3 * D, 2) > 0).to(dtype), (2 * normal(2, D, seed=1)).to(dtype)
    tensors = {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down, f"{prefix}.alpha": torch.tensor(3)}
    expected = wanted({"double_blocks.1.img_attn.qkv": up.float() @ down.float() * 1.5})
    assert_same(read(tensors), expected)
    layers = by_layer(tensors, SHAPES, "x", naming=naming)
    for written in (as_kohya(layers, naming, SHAPES), as_peft(layers), as_lycoris(layers)):
        assert {t.dtype for t in written.values()} <= {torch.float32, torch.bfloat16}
        assert_same(read(written), expected)


def test_factors_of_different_ranks_are_named():
    tensors = {f"{K}.lora_up.weight": normal(3 * D, 2), f"{K}.lora_down.weight": normal(3, D)}
    with pytest.raises(UserError, match=r"x': lora_up.weight and lora_down.weight of '.*to_q' have different ranks"):
        check_shapes(by_layer(tensors, SHAPES, "x", naming=naming), SHAPES, "x")


def test_a_dense_change_of_a_fused_layer():
    module, change = "single_blocks.2.linear1", normal(7 * D, D)
    assert_same(read({f"diffusion_model.{module}.diff": change}, dense=True), wanted({module: change}))
    with pytest.raises(UserError, match=r"linear1.diff' is of a kind"):
        read({f"diffusion_model.{module}.diff": change})


def test_a_rank_of_zero_is_refused():
    """It would be merged and exported as an adapter that changes nothing."""
    layer = f"transformer.{ATTN}.to_q"
    with pytest.raises(UserError, match=r"a lora_\w+\.weight of shape .*0.*, which none can have"):
        read({f"{layer}.lora_A.weight": normal(0, D), f"{layer}.lora_B.weight": normal(D, 0)})


def of_kind(form: str, names: list[str] | None, alpha: float | None, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    layers = adapted(form, names).layers
    for factors in layers.values():
        factors |= {n: t.to(dtype) for n, t in factors.items() if n != "alpha"}
        if alpha is not None:
            factors["alpha"] = torch.tensor(alpha)
    return layers


PARTIAL = [f"{ATTN}.to_k", f"{SINGLE}.proj_mlp", f"{SINGLE}.attn.to_q", "norm_out.linear", "transformer_blocks.0.attn.to_v"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("names", [None, PARTIAL], ids=["all", "some"])
def test_reading_kohya_undoes_writing_it(names, alpha, dtype):
    """Bit for bit: every linear's own factors come back, those that were not adapted do not, and alpha / rank is the same."""
    layers = of_kind("lora", names, alpha, dtype)
    for factors in layers.values():  # ranks differ, and with them the scales; exact halves of each other
        factors |= {"alpha": torch.tensor(float(factors["lora_down.weight"].shape[0]) / 2)} if alpha else {}
    back = by_layer(as_kohya(layers, naming, SHAPES), SHAPES, "x", naming=naming)
    assert back.keys() == layers.keys()
    for name, factors in layers.items():
        assert back[name].keys() == factors.keys() == {"lora_up.weight", "lora_down.weight", "alpha"}
        assert all(torch.equal(back[name][f], factors[f]) and back[name][f].dtype == factors[f].dtype for f in factors)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 5.0])
def test_writing_kohya_undoes_reading_it(alpha):
    """A LoRA that was trained on fused layers keeps its rank, its factors and its alpha."""
    tensors = {}
    for i, module in enumerate([*FUSED, "final_layer.adaLN_modulation.1"]):
        rows, columns = size(module) if module in FUSED else (2 * D, D)
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_up.weight": normal(rows, 2, seed=i), f"{name}.lora_down.weight": normal(2, columns, seed=i)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    again = as_kohya(by_layer(tensors, SHAPES, "x", naming=naming), naming, SHAPES)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_columns_that_serve_no_linear_change_nothing():
    layers = of_kind("lora", [f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_v"], None, torch.float32)
    rank = layers[f"{SINGLE}.attn.to_v"]["lora_up.weight"].shape[1]
    layers[f"{SINGLE}.attn.to_v"]["lora_up.weight"][:, rank - 1] = 0
    deltas = {name: weight_change(f) for name, f in layers.items()}
    assert_same(read(as_kohya(layers, naming, SHAPES)), deltas)
    for factors in layers.values():
        factors["lora_up.weight"].zero_()  # as a LoRA starts
    assert not any(change.any() for change in read(as_kohya(layers, naming, SHAPES)).values())


@pytest.mark.parametrize("by", [3.0, 0.1])
@pytest.mark.parametrize(("form", "write"), [("lora", as_peft), ("lora", as_transformer), ("lokr-rank", as_transformer)])
def test_a_scale_that_bf16_cannot_hold_is_not_rounded_into_it(form, write, by):
    layers = of_kind(form, None, None, torch.bfloat16)
    for factors in layers.values():
        factors["alpha"] = torch.tensor(by)
    deltas = {name: weight_change(f) for name, f in layers.items()}
    back = {name: weight_change(f) for name, f in by_layer(write(layers), SHAPES, "x").items()}
    for name, change in back.items():
        torch.testing.assert_close(change, deltas[name], rtol=1e-5, atol=1e-6)


Q = "transformer.transformer_blocks.0.attn.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, D), f"{Q}.lora_B.weight": torch.ones(D, 2)}
K = "lora_unet_double_blocks_1_img_attn_qkv"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ({f"{Q}.dora_scale": torch.ones(1, D)}, r"is a DoRA \(tensor '.*dora_scale'\)"),
        ({f"{Q}.lora_magnitude_vector.weight": torch.ones(D)}, "is a DoRA"),
        ({f"{Q}.lora_magnitude_vector.default.weight": torch.ones(D)}, "is a DoRA"),
        ({f"{K}.dora_scale": torch.ones(1)}, "is a DoRA"),
        ({"transformer$$transformer_blocks$$0$$attn$$to_q.magnitude": torch.ones(1)}, "is a DoRA"),
        ({f"{K}.hada_w1_a": torch.ones(1, 1)}, r"is a LoHa \(tensor '.*hada_w1_a'\)"),
        ({"lycoris_x_embedder.hada_w2_b": torch.ones(1, 1)}, "is a LoHa"),
        ({"lycoris_x_embedder.lokr_t2": torch.ones(1, 1)}, "Tucker"),
        ({"lora_unet_x.lora_mid.weight": torch.ones(1, 1)}, "Tucker"),
        ({f"{Q}.oft_blocks": torch.ones(1, 1)}, "is an OFT"),
        ({f"{Q}.lora_B.bias": torch.ones(1)}, "changes biases"),
        ({"diffusion_model.img_in.diff_b": torch.ones(1)}, "changes biases"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(1, 1)}, "lora_te1_.*of a text encoder"),
        ({"text_encoder.text_model.x.lora_A.weight": torch.ones(1, 1)}, "text_encoder.*of a text encoder"),
        ({"lora_unet_double_blocks_19_img_mod_lin.alpha": torch.ones(1)}, "blocks_19_img_mod_lin.alpha' belongs"),
        ({"x.lora_up.weight": torch.ones(1), "y.alpha": torch.ones(1)}, r"'x.lora_up.weight' belongs to .*\(and 1 more\)"),
        ({f"{Q}.lora_mystery": torch.ones(1)}, "lora_mystery' is of a kind"),
        ({f"{K}.lora_up.weight": torch.ones(3 * D, 2)}, "double_blocks.1.img_attn.qkv' is incomplete"),
        ({f"{K}.lora_up.weight": torch.ones(3 * D + 1, 2), f"{K}.lora_down.weight": torch.ones(2, D)}, "97 rows.*has 96"),
        (
            {f"{K}.lora_up.weight": torch.ones(3 * D, 2), f"{K}.lora_down.weight": torch.ones(2, D)}
            | {f"lycoris_transformer_blocks_1_attn_to_v.lora_{x}": torch.ones(D, D) for x in ("up.weight", "down.weight")},
            "to_v' has two adapters, its own and that of a fused layer",
        ),
        ({f"lycoris_{Q[12:].replace('.', '_')}.lora_up.weight": torch.ones(D, 2)}, "two tensors lora_up.*under two names"),
    ],
)  # fmt: skip
def test_what_cannot_be_applied_whole_is_refused_by_name(added, said):
    with pytest.raises(UserError, match=said) as refused:
        by_layer(PAIR | added, SHAPES, "my.safetensors", naming=naming)
    assert "my.safetensors" in str(refused.value)
