"""The formats of adapter files, each read back by the program it is for, or by its formula."""

from types import CodeType, FunctionType, SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import lora_pipeline
from safetensors.torch import save_file
from torch import nn

import dedistill
from dedistill.adapters.attach import Adapter
from dedistill.adapters.delta import weight_change
from dedistill.adapters.formats import as_kohya, as_lycoris, as_peft, as_transformer, by_layer
from dedistill.adapters.targets import Resolved, adaptable
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.quantize import linear_names

WIDTH = 32
SIZES = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}


def flux(guidance: bool = False, seed: int = 0) -> FluxTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = FluxTransformer2DModel(**SIZES, guidance_embeds=guidance)
        for p in denoiser.parameters():
            p.data.normal_(std=0.1)
    return denoiser.requires_grad_(False).eval()


def answer(denoiser: nn.Module) -> torch.Tensor:
    """The network's answer [2, 6, 4] to a fixed question."""
    noise = lambda name, *shape: keyed.noise(0, name, 0, range(2), shape)  # noqa: E731
    ids = torch.zeros(6, 3)
    ids[:, 1] = torch.arange(6)
    guidance = {"guidance": torch.tensor([1.0, 3.0])} if denoiser.config.guidance_embeds else {}
    return denoiser(
        hidden_states=noise("picture", 6, 4),
        encoder_hidden_states=noise("text", 5, 24),
        pooled_projections=noise("pooled", 20),
        timestep=torch.tensor([0.3, 0.8]),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
        **guidance,
    )[0].detach()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


FORMS = {
    "lokr": lambda i: ("lokr", 4, None),
    "lokr-rank": lambda i: ("lokr", 4, 2),
    "lokr-mixed": lambda i: ("lokr", (2, 4, 8, 5, -1)[i % 5], (None, 1)[i % 2]),
    "lora": lambda i: ("lora", None, 1 + i % 3),
}


def adapted(form: str, names: list[str] | None = None) -> SimpleNamespace:
    """A small FLUX with an adapter on ``names`` (every linear by default), its answer and its file's tensors."""
    denoiser = flux(guidance=True)
    before = answer(denoiser)
    shapes = adaptable(denoiser)
    chosen = []
    for i, name in enumerate(names or shapes):
        kind, factor, rank = FORMS[form](i)
        chosen.append(Resolved(name, shapes[name], factor, rank, "x"))
    adapter = Adapter(denoiser, kind, chosen)
    for name, p in adapter.trainable().items():
        p.data.copy_(torch.from_numpy(keyed.generator(0, name).standard_normal(tuple(p.shape), dtype="float32")) * 0.2)
    with torch.no_grad():
        after = answer(denoiser)
    assert relative(after, before) > 0.02
    adapter.detach_from_base()
    tensors = adapter.tensors()
    deltas = {name: weight_change(f) for name, f in by_layer(tensors, shapes, "x").items()}
    return SimpleNamespace(tensors=tensors, shapes=shapes, answer=after, layers=by_layer(tensors, shapes, "x"), deltas=deltas)


def rewidened(function: FunctionType) -> FunctionType:
    """``function`` of diffusers with FLUX's hidden size, which it has as a constant, replaced by this file's."""

    def replaced(value):
        if isinstance(value, CodeType):
            return value.replace(co_consts=tuple(map(replaced, value.co_consts)))
        if isinstance(value, tuple):
            return tuple(map(replaced, value))
        return {3072: WIDTH, 12288: 4 * WIDTH}.get(value, value) if type(value) is int else value

    copy = FunctionType(replaced(function.__code__), function.__globals__, None, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


lokr_forms = pytest.mark.parametrize("form", [f for f in FORMS if f != "lora"])
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("write", [as_lycoris, as_transformer])
def test_what_is_written_is_read_back_as_the_same_change(form, write):
    """Both formats, taken apart by the list of linears, give every layer's delta back."""
    own = adapted(form)
    back = by_layer(write(own.layers), own.shapes, "x")
    assert back.keys() == own.deltas.keys() == own.shapes.keys()
    for name, factors in back.items():
        assert relative(weight_change(factors), own.deltas[name]) < 1e-6
    if write is as_lycoris:
        assert as_lycoris(own.layers).keys() == own.tensors.keys()
    else:
        assert not any(key.endswith(".alpha") for key in as_transformer(own.layers))


def comfy_change(tensors: dict, x: str) -> torch.Tensor:
    """ComfyUI's change of weight for the tensors under the name ``x``, written from FORMATS 1b and nothing else:
    Kronecker or matrix product, times alpha / rank only where a factor is low-rank and alpha is there."""
    get = lambda name: tensors.get(f"{x}.{name}")  # noqa: E731
    if get("lora_up.weight") is not None:
        product, rank = get("lora_up.weight") @ get("lora_down.weight"), get("lora_down.weight").shape[0]
    else:
        rank, factors = None, []
        for w in ("lokr_w1", "lokr_w2"):
            whole = get(w)
            if whole is None:
                rank = get(f"{w}_b").shape[0]
                whole = get(f"{w}_a") @ get(f"{w}_b")
            factors.append(whole)
        (a, b), (c, d) = factors[0].shape, factors[1].shape
        product = torch.einsum("ab,cd->acbd", *factors).reshape(a * c, b * d)
    return product * (float(get("alpha")) / rank) if rank and get("alpha") is not None else product


@every_form
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_comfyui_reads_our_files_as_we_do(form, alpha):
    """A from-scratch reading of ComfyUI's formula equals our delta, also at another alpha."""
    own = adapted(form)
    if alpha is not None:
        own.layers = {n: {**f, "alpha": torch.tensor(alpha)} for n, f in own.layers.items()}
    for write, prefix in ((as_lycoris, "lycoris_"), (as_transformer, "transformer.")):
        tensors = write(own.layers)
        for name, factors in own.layers.items():
            key = prefix + (name.replace(".", "_") if prefix == "lycoris_" else name)
            assert relative(comfy_change(tensors, key), weight_change(factors)) < 1e-6


def test_kohya_is_the_same_change_of_the_fused_weights():
    """The rows BFL's fused weight gives each part change exactly as ours do; the rest stays as it is."""
    own = adapted("lora")
    tensors = as_kohya(own.layers, naming, own.shapes)
    places = {name: naming.original_name(name, own.shapes) for name in own.shapes}
    assert {naming.kohya_name(bfl) for bfl, _ in places.values()} == {key.partition(".")[0] for key in tensors}
    for name, (bfl, rows) in places.items():
        change = comfy_change(tensors, naming.kohya_name(bfl))[rows]
        if bfl == "final_layer.adaLN_modulation.1":
            change = torch.cat([change[WIDTH:], change[:WIDTH]])
        assert relative(change, own.deltas[name]) < 1e-6, name


PARTIAL = ["transformer_blocks.1.attn.to_k", "single_transformer_blocks.2.proj_mlp", "single_transformer_blocks.2.attn.to_q"]


@pytest.mark.parametrize("names", [None, PARTIAL], ids=["all", "some"])
def test_diffusers_loads_our_kohya_file(names, tmp_path, monkeypatch):
    """Through FluxPipeline.lora_state_dict, at equal answers; also where only parts of fused layers are trained."""
    own = adapted("lora", names)
    save_file(as_kohya(own.layers, naming, own.shapes), tmp_path / "kohya.safetensors")
    convert = rewidened(lora_pipeline._convert_kohya_flux_lora_to_diffusers)
    monkeypatch.setattr(lora_pipeline, "_convert_kohya_flux_lora_to_diffusers", convert)
    state, alphas = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="kohya.safetensors", return_alphas=True)
    # the converter leaves the prefix out outside the blocks
    state = {k if k.startswith("transformer.") else f"transformer.{k}": t for k, t in state.items()}
    denoiser = flux(guidance=True)
    FluxPipeline.load_lora_into_transformer(state, network_alphas=alphas, transformer=denoiser)
    assert relative(answer(denoiser), own.answer) < 1e-6


def test_diffusers_loads_our_peft_file(tmp_path):
    """PEFT's names, without alphas, mixed ranks."""
    own = adapted("lora")
    save_file(as_peft(own.layers), tmp_path / "peft.safetensors", metadata={"format": "pt"})
    state, alphas, _ = FluxPipeline.lora_state_dict(
        str(tmp_path), weight_name="peft.safetensors", return_alphas=True, return_lora_metadata=True
    )
    denoiser = flux(guidance=True)
    FluxPipeline.load_lora_into_transformer(state, network_alphas=alphas, transformer=denoiser)
    assert relative(answer(denoiser), own.answer) < 1e-6


def test_diffusers_loads_a_lokr_of_one_factor(tmp_path):
    """The transformer format in diffusers' own loader, which takes one factor and no more."""
    names = [n for n in linear_names(flux()) if ".attn." in n]
    own, denoiser = adapted("lokr", names), flux(guidance=True)
    denoiser.load_lora_adapter(as_transformer(own.layers), prefix="transformer")
    assert relative(answer(denoiser), own.answer) < 1e-6
    with pytest.raises(ValueError, match="decompose_factor"):
        flux(guidance=True).load_lora_adapter(as_transformer(adapted("lokr-mixed").layers), prefix="transformer")


@lokr_forms
@pytest.mark.parametrize("write", [as_lycoris, as_transformer])
def test_load_lokr_equals_our_adapter(form, write, tmp_path):
    """Any mixture of factors and ranks, through a pipeline, at equal answers; and out again."""
    own = adapted(form)
    save_file(write(own.layers), tmp_path / "a.safetensors")
    denoiser = flux(guidance=True)
    before = answer(denoiser)
    name = dedistill.load_lokr(SimpleNamespace(transformer=denoiser), tmp_path / "a.safetensors")
    assert relative(answer(denoiser), own.answer) < 1e-6
    with pytest.raises(UserError, match="already has an adapter 'dedistill'"):
        dedistill.load_lokr(denoiser, tmp_path / "a.safetensors")
    denoiser.set_adapters([name], weights=[0.0])
    assert relative(answer(denoiser), before) < 1e-6
    denoiser.delete_adapters([name])
    assert torch.equal(answer(denoiser), before)


def test_load_lokr_refuses_what_it_cannot_load_whole(tmp_path):
    """Bad input: nothing is loaded; file and tensor are named."""
    own, denoiser = adapted("lokr"), flux(guidance=True)
    before = answer(denoiser)
    first = next(iter(own.tensors))

    def refused(tensors: dict, match: str):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=match):
            dedistill.load_lokr(denoiser, tmp_path / "bad.safetensors")
        assert torch.equal(answer(denoiser), before)

    refused(own.tensors | {"lycoris_no_such_layer.lokr_w1": torch.ones(1)}, r"bad\.safetensors.*lycoris_no_such_layer")
    refused({k: t for k, t in own.tensors.items() if k != first}, "incomplete")
    refused(own.tensors | {"lycoris_x_embedder.dora_scale": torch.ones(1)}, "dora_scale.*not supported")
    refused(own.tensors | {"transformer.x_embedder.lokr_w1": torch.ones(4, 4)}, "under two names")
    refused(own.tensors | {"lycoris_x_embedder.lokr_w2": torch.ones(4, 4)}, r"'x_embedder' gives a weight of shape \(16, 4\)")
    refused(adapted("lora").tensors, "is a LoRA")


@pytest.mark.parametrize("write", [as_peft, lambda layers: as_kohya(layers, naming, {})])
def test_a_lokr_is_not_written_as_a_lora(write):
    with pytest.raises(UserError, match="LoRA only"):
        write(adapted("lokr", ["x_embedder"]).layers)


def test_a_name_that_the_package_has_not():
    with pytest.raises(AttributeError, match="no_such"):
        _ = dedistill.no_such


@pytest.mark.parametrize(("written", "own"), [("unet", "transformer"), ("transformer", "unet")])
def test_names_of_another_kind_of_pipeline_are_refused(written, own):
    """A file for the denoiser of another folder is not taken for one of this network, whatever its layers are called."""
    adapter = adapted("lokr")
    tensors = as_transformer(adapter.layers, written)
    assert by_layer(tensors, adapter.shapes, "x", folder=written).keys() == adapter.layers.keys()
    with pytest.raises(UserError, match=rf"tensor '{written}\..*' belongs to no layer of this network"):
        by_layer(tensors, adapter.shapes, "x", folder=own)
