"""What a run will cost: operations, memory, steps, passes over the data, time.

Counts of weights, steps and structures are exact. Kept neighbors are an estimate, and so is all
that follows from them: operations and hours.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coset.pet.hypers import CutoffHypers, NetworkHypers, PetHypers
from coset.training.settings import StageSettings, TrainSettings

BYTES_PER_PARAMETER = 20
"""Weights, gradients, two moments of Adam and averaged weights in float32."""

KEPT_PER_NEIGHBOR = 1.5
"""Edges that survive the pair cutoff over `n_neighbors`: 0.6 to 2 over kinds of crystals."""

ATOMS_PER_A3 = 0.044
"""Density of atoms: OMat24 has 39 neighbors within 6 Å."""

FORWARDS_DIRECT, FORWARDS_CONSERVATIVE = 3, 6
"""Operations of a step over those of the energy: two products for one on the way back, and all
of it twice where forces are gradients (measured 6.2)."""

STEP_PER_PRODUCTS = 2.0
"""Time of a step over that of its matrix products: 1.3 to 3.0 on CPUs for d_pet from 128 to 64."""

ROWS, CALLS = 4096, 16


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSize:
    """What a store says of itself, or the problem with it."""

    path: str
    structures: int = 0
    atoms: int = 0
    bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage; hours are NaN where a store is missing."""

    name: str
    steps: int
    structures: int
    hours: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole run. passes: how often every training store is seen; NaN: unknown."""

    parameters: int
    kept_neighbors: float
    forward_flop_per_atom: float
    memory_bytes: int
    atoms_per_structure: float
    flop_per_s: float
    stages: tuple[StagePlan, ...]
    steps: int
    structures: int
    hours: float
    passes: tuple[float, ...]


def make_plan(settings: TrainSettings, stores: Sequence[StoreSize], flop_per_s: float) -> Plan:
    """Costs of a run over training stores of the given sizes, with the given rate of products."""
    parameters = settings.model.n_parameters()
    kept = kept_neighbors(settings.model.cutoff)
    forward = forward_flop_per_atom(settings.model, kept)
    shares = [store.share for store in settings.data.train]
    atoms = _atoms_per_structure(shares, stores)
    per_structure = STEP_PER_PRODUCTS * atoms * forward / flop_per_s / 3600.0
    stages = tuple(_stage(s, settings.batch.structures, per_structure) for s in settings.stages)
    structures = sum(stage.structures for stage in stages)
    return Plan(
        parameters=parameters,
        kept_neighbors=kept,
        forward_flop_per_atom=forward,
        memory_bytes=BYTES_PER_PARAMETER * parameters,
        atoms_per_structure=atoms,
        flop_per_s=flop_per_s,
        stages=stages,
        steps=settings.steps,
        structures=structures,
        hours=sum(stage.hours for stage in stages),
        passes=tuple(
            structures * share / sum(shares) / store.structures if store.structures else math.nan
            for share, store in zip(shares, stores, strict=True)
        ),
    )


def kept_neighbors(cutoff: CutoffHypers) -> float:
    """Edges per atom that reach the network, estimated."""
    inside = ATOMS_PER_A3 * 4.0 / 3.0 * math.pi * cutoff.cutoff**3
    if cutoff.n_neighbors is None:
        return inside
    return min(inside, KEPT_PER_NEIGHBOR * cutoff.n_neighbors)


def forward_flop_per_atom(hypers: PetHypers, kept: float) -> float:
    """Operations of one evaluation of all heads, per atom with `kept` edges.

    F = 2 [Σ_weights uses · size + G A · 2 d T²],  T = kept + 1

    The second term is that of scores and values of attention. Norms, embeddings and activations
    are left out.
    """
    net, tokens = hypers.network, kept + 1.0
    products = sum(
        _uses(name, kept) * math.prod(shape)
        for name, shape in hypers.parameter_shapes().items()
        if len(shape) == 2
    )
    layers = net.n_gnn_layers * net.n_attention_layers
    return 2.0 * (products + layers * 2.0 * net.d_pet * tokens**2)


def matmul_flop_per_s(network: NetworkHypers, device: torch.device, seconds: float = 0.3) -> float:
    """Measured rate of float32 products of the size of the edge layers."""
    rows = torch.ones(ROWS, network.d_pet, device=device)
    weight = torch.ones(network.d_pet, 2 * network.d_feedforward, device=device)

    def multiply() -> None:
        for _ in range(CALLS):
            product = rows @ weight
        float(product[0, 0])  # waits for the device

    multiply()  # warms up
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        multiply()
        rounds += 1
    return 2.0 * rounds * CALLS * rows.numel() * weight.shape[1] / elapsed


def _uses(name: str, kept: float) -> float:
    """How often the evaluation of one atom multiplies by a weight."""
    if ".attention." in name:
        return kept + 1.0
    if name.startswith(("node_heads.", "node_last_layers.")) or ".center_" in name:
        return 1.0
    per_species = name == "edge_embedder.weight" or ".neighbor_embedder." in name
    if per_species or name.startswith(("node_embedders.", "system_conditioning.")):
        return 0.0
    return kept


def _atoms_per_structure(shares: Sequence[float], stores: Sequence[StoreSize]) -> float:
    """Mean over the mixture; NaN if a store is unknown or empty."""
    means = [store.atoms / store.structures if store.structures else math.nan for store in stores]
    return sum(s * mean for s, mean in zip(shares, means, strict=True)) / sum(shares)


def _stage(stage: StageSettings, batch: int, hours_per_structure: float) -> StagePlan:
    """hours_per_structure: of one evaluation of the energy."""
    structures = stage.steps * batch
    forwards = FORWARDS_CONSERVATIVE if stage.loss.conservative else FORWARDS_DIRECT
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        structures=structures,
        hours=structures * forwards * hours_per_structure,
    )
