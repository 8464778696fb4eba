"""Ranks: who we are, and sums over all of us. Nothing else in the package knows about ranks.

Started by torchrun, SLURM or MPI; alone without them. Gradients are summed explicitly instead of
through a wrapper of the network: the loss is already divided by global counts, twice
differentiated graphs need no hooks, and one flat message carries the flags as well.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coset.errors import ConfigError

RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0


def discover() -> Ranks:
    """Rank, number of ranks and rank on this node, from the environment.

    Raises:
        ConfigError: a launcher started several processes that do not know of each other.
    """
    for rank, world, local in RANK_VARIABLES:
        if rank in os.environ and world in os.environ:
            found = Ranks(
                rank=int(os.environ[rank]),
                world=int(os.environ[world]),
                local=int(os.environ.get(local, "0")),
            )
            if found.world > 1 and "MASTER_ADDR" not in os.environ:
                raise ConfigError(
                    f"{world} = {found.world}, but MASTER_ADDR is not set: {found.world} copies of "
                    "the same run would overwrite each other",
                    code="RanksUnconnected",
                    hint="start with torchrun, or export MASTER_ADDR and MASTER_PORT",
                )
            return found
    return Ranks()


def is_main() -> bool:
    """Whether this process writes and speaks."""
    return discover().main


def connect(ranks: Ranks, device: torch.device) -> None:
    """Join the other ranks, if there are any."""
    if ranks.world > 1 and not dist.is_initialized():
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=ranks.rank, world_size=ranks.world
        )


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def disconnect() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in place; the same on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[Tensor], extra: Tensor) -> Tensor:
    """Gradients summed over ranks in one message together with `extra`, whose sum is returned."""
    if not dist.is_initialized():
        return extra
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([*(part.reshape(-1) for part in parts), extra.to(parts[0])])
    dist.all_reduce(flat)
    start = 0
    for parameter in parameters:
        piece = flat[start : start + parameter.numel()]
        parameter.grad = piece.view_as(parameter)
        start += parameter.numel()
    return flat[start:].to(extra)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; emulated is ten times slower."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
