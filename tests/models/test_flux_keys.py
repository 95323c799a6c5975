"""FLUX under two sets of names: every linear and tensor at full size, and the same network through diffusers' own reader."""

from itertools import pairwise
from types import CodeType, FunctionType

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_model
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from original_files import as_original
from safetensors.torch import save_file
from torch import nn

from dedistill.errors import UserError
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.registry import spec_of
from dedistill.release.export import names_of

SMALL = {
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
with_and_without_guidance = pytest.mark.parametrize("guidance", [False, True], ids=["schnell", "dev"])


def full_size(guidance: bool, layers: int = 19) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=guidance, num_layers=layers)


def small(guidance: bool) -> FluxTransformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = FluxTransformer2DModel(**SMALL, guidance_embeds=guidance)
        for p in denoiser.parameters():
            p.data.normal_(std=0.2)
    return denoiser.requires_grad_(False)


def linear_shapes(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    return {n: (m.out_features, m.in_features) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}


def narrowed(function: FunctionType, width: int) -> FunctionType:
    """``function`` of diffusers with FLUX's hidden size, which it has as a constant, replaced by ``width``."""

    def replaced(value):
        if isinstance(value, CodeType):
            return value.replace(co_consts=tuple(map(replaced, value.co_consts)))
        return width if type(value) is int and value == 3072 else value

    return FunctionType(replaced(function.__code__), function.__globals__)


@with_and_without_guidance
def test_every_tensor_of_the_full_network_has_its_place(guidance):
    """19 + 38 blocks; diffusers' own reader turns our names back into exactly the network's names and shapes."""
    state = full_size(guidance).state_dict()
    bfl = as_original(naming, state)
    assert sum(t.numel() for t in bfl.values()) == sum(t.numel() for t in state.values())
    assert any("guidance_in" in name for name in bfl) == guidance
    assert bfl["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert bfl["double_blocks.0.img_attn.qkv.weight"].shape == (9216, 3072)
    back = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in state.items()}


@with_and_without_guidance
def test_every_linear_of_the_full_network_has_a_name_in_every_table(guidance):
    """Names are distinct, and the rows of every fused weight are taken exactly once."""
    shapes = linear_shapes(full_size(guidance))
    assert len(shapes) == 494 + (10 if guidance else 8)
    places = {name: naming.original_name(name, shapes) for name in shapes}
    assert len({(bfl, rows.start) for bfl, rows in places.values()}) == len(shapes)
    bfl_rows = {n: len(t) for n, t in as_original(naming, full_size(guidance).state_dict()).items()}
    for bfl in {bfl for bfl, _ in places.values()}:
        taken = sorted((rows.start, rows.stop) for name, rows in places.values() if name == bfl)
        assert taken[0][0] == 0 and taken[-1][1] == bfl_rows[f"{bfl}.weight"]
        assert all(a[1] == b[0] for a, b in pairwise(taken))
        assert naming.kohya_name(bfl) == "lora_unet_" + bfl.replace(".", "_")
    for spell in (lambda n: "lycoris_" + n.replace(".", "_"), lambda n: f"transformer.{n}"):
        assert len({spell(n) for n in shapes}) == len(shapes)


@with_and_without_guidance
def test_same_network_through_from_single_file(guidance, tmp_path, monkeypatch):
    """Bit-equal tensors and answers through diffusers' loader, offline, given the folder of the config."""
    denoiser = small(guidance)
    save_file({n: t.contiguous() for n, t in as_original(naming, denoiser.state_dict()).items()}, tmp_path / "bfl.safetensors")
    denoiser.save_config(tmp_path / "config")
    reader = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(reader, "checkpoint_mapping_fn", narrowed(reader["checkpoint_mapping_fn"], 32))
    monkeypatch.delitem(reader, "default_subfolder")
    back = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "bfl.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    wanted, found = denoiser.state_dict(), back.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    torch.testing.assert_close(answer(back), answer(denoiser), rtol=0, atol=0)
    assert answer(denoiser).std() > 0.05


def answer(denoiser: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = torch.zeros(6, 3)
    ids[:, 2] = torch.arange(6)
    return denoiser(
        hidden_states=draw(2, 6, 4),
        encoder_hidden_states=draw(2, 5, 24),
        pooled_projections=draw(2, 20),
        timestep=torch.tensor([0.2, 0.7]),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([1.0, 3.5]) if denoiser.config.guidance_embeds else None,
        return_dict=False,
    )[0].detach()


def test_halves_of_the_last_modulation_change_places():
    """BFL has (shift, scale), diffusers (scale, shift)."""
    denoiser = small(False)
    bfl = as_original(naming, denoiser.state_dict())["final_layer.adaLN_modulation.1.weight"]
    own = denoiser.norm_out.linear.weight
    assert torch.equal(bfl[:32], own[32:]) and torch.equal(bfl[32:], own[:32])


def test_what_does_not_fit_is_refused_by_name():
    state = small(False).state_dict()
    with pytest.raises(UserError, match="no_such"):
        as_original(naming, {**state, "transformer_blocks.0.no_such.weight": torch.zeros(1)})
    del state["single_transformer_blocks.1.attn.to_k.bias"]
    with pytest.raises(UserError, match=r"single_transformer_blocks\.1\.attn\.to_k\.bias"):
        as_original(naming, state)
    with pytest.raises(UserError, match=r"NoSuchTransformer.*FluxTransformer2DModel"):
        spec_of({"_class_name": "NoSuchTransformer"})
    with pytest.raises(UserError, match=r"'FluxTransformer2DModel'.* not one of example; known: ExampleNet$"):
        spec_of({"_class_name": "FluxTransformer2DModel"}, "example")
    assert names_of(spec_of({"_class_name": "FluxTransformer2DModel"})) is naming
