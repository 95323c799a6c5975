"""One step of torchtitan's FLUX trainer against ours, on the same weights, latents, noise and sigma: an oracle that no one
here wrote. Skipped where it is absent: pip install --no-deps torchtitan spmd_types tyro docstring_parser torchdata einops
torch_checkpointing datasets multiprocess dill xxhash pandas."""

import dataclasses

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn import functional as F

from dedistill.flow.path import flow_loss, interpolate
from dedistill.flow.path import velocity as straight
from dedistill.models.conditioning import Conditioning
from dedistill.models.flux import loading
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.flux.network import flux_velocity, patchify
from dedistill.models.network_files import build
from dedistill.models.original_names import from_original

torchtitan = pytest.importorskip("torchtitan.models.flux", exc_type=ImportError)
SIZES = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 12}
LATENTS, TOKENS = (16, 8, 12), 7


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """Its smallest model, one block of each kind; random weights in every tensor."""
    config = torchtitan.flux_configs["flux-debug"]
    config = config() if callable(config) else config
    blocks = {name: getattr(config, name)[:1] for name in ("double_blocks", "single_blocks")}
    model = dataclasses.replace(config, depth=1, depth_single_blocks=1, **blocks).build().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn + (1.0 if "norm" in name and parameter.ndim == 1 else 0.0))
    return model


def original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the model's first names, which it has but for the norms of queries and keys."""
    return {
        name.replace("query_norm.weight", "query_norm.scale").replace("key_norm.weight", "key_norm.scale"): tensor
        for name, tensor in tensors.items()
    }


def test_a_step_is_torchtitans(theirs):
    """Velocity, loss and the gradient of every tensor; its names are the original ones, which our map turns into diffusers'."""
    from torchtitan.models.flux.utils import create_position_encoding_for_latents, pack_latents

    empty = loading.empty_network(SIZES, "torchtitan")
    shapes = {name: tuple(p.shape) for name, p in empty.named_parameters()}
    ours = build(
        FluxTransformer2DModel, SIZES, from_original(naming, original(theirs.state_dict()), shapes, "torchtitan"), "torchtitan"
    )
    data, noise = (torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    embeds, pooled = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)) for shape in ((TOKENS, 4096), (768,)))
    sigma = torch.tensor([0.3, 0.9])
    noisy, target = interpolate(data, noise, sigma), straight(data, noise)
    assert torch.equal(pack_latents(noisy), patchify(noisy, 2))

    found = theirs(
        img=pack_latents(noisy),
        img_ids=create_position_encoding_for_latents(2, *LATENTS[1:], 3),
        txt=embeds,
        txt_ids=torch.zeros(2, TOKENS, 3),
        y=pooled,
        timesteps=sigma,
    )
    their_loss = F.mse_loss(found, pack_latents(target), reduction="sum") / target.numel()
    their_loss.backward()

    text = Conditioning.of(embeds, torch.ones(2, TOKENS, dtype=torch.bool), pooled=pooled)
    own = flux_velocity(ours, ours, noisy, sigma, text, mask="bool")
    loss = flow_loss(own, target).mean()
    loss.backward()

    torch.testing.assert_close(patchify(own, 2), found, rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    gradients = from_original(naming, original({name: p.grad for name, p in theirs.named_parameters()}), shapes, "torchtitan")
    for name, parameter in ours.named_parameters():
        difference = float((parameter.grad - gradients[name]).norm() / gradients[name].norm())
        assert difference < 1e-4, (name, difference)
