"""A frozen base in parts on all processes, put together block by block while it is used: FSDP2 of torch."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dedistill.distributed.world import World
from dedistill.errors import UserError, amount
from dedistill.models.model import Model
from dedistill.models.quantize import check_engine
from dedistill.training.engine import Engine


class Fsdp2(Engine):
    """The base in parts. Its adapter is no part of the network, so it is trained as where every process holds everything."""

    name, placement = "fsdp2", ", the base in parts"
    requires_equal_forwards = builds_on_cpu = True

    def check(self) -> None:
        super().check()
        if self.recipe.adapter is None:
            raise UserError(
                "FSDP2 shards a frozen base, and without a table [adapter] the whole network is trained. Use launch/ddp.yaml.",
                2,
            )
        check_engine(self.recipe, self.name, "launch/ddp.yaml")

    def place(self, model: Model, device: torch.device | str) -> None:
        shard_base(model, self.world, device)
        super().place(model, device)


def shard_base(model: Model, world: World, device: torch.device | str) -> None:
    """Leave each process its part of the frozen base, about 1 / ``world.size`` of it, on ``device``, as it is stored.

    ``model`` may lie in the memory of the CPU: one block after the other comes to ``device``, is cut and leaves it again.
    Its forward then gathers a block, uses it and gives it back; backward does so again. All ranks must run equally many
    passes. What reads the weights themselves must have done so before.
    """
    # it warns of writing into what a block returns, which would lose its hooks; no family does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    denoiser, device = model.components.denoiser, torch.device(device)
    mesh = init_device_mesh(device.type, (world.size,))
    blocks = model.family.blocks(denoiser)
    for block in blocks:
        # the last one is needed again at once, where backward starts
        fully_shard(block, mesh=mesh, reshard_after_forward=block is not blocks[-1])
    fully_shard(denoiser, mesh=mesh)
    if whole := [name for name, parameter in denoiser.named_parameters() if not isinstance(parameter, DTensor)]:
        tensors = amount(len(whole), "tensor of the base is", "tensors of the base are")
        raise UserError(f"FSDP2 was asked for, and {tensors} whole, e.g. {whole[0]}")
    model.root.to(device)
    model.device = model.components.device = device
    model.facts["storage_bytes_here"] = local_bytes(denoiser)


def local_bytes(denoiser: nn.Module) -> int:
    """Bytes of the parameters of a sharded network that this process holds between passes."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in denoiser.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)
