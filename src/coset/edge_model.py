"""The seam on which everything stands: energies and gradients with respect to edge vectors.

A model sees only edge vectors r_e, so whatever this package does (rotations, Bloch phases,
Hessians, chunks, training) acts there. The model is split in two: `geometry` (which edges, with
what weight: rotation invariant) and `network` (the energy of rotated edge vectors).
`edge_gradient` joins them:

    g_e = dE/dr_e = sum_k w_k R_k^T dE/d(R_k r_e) + (dE/df) df/dr_e

Nothing here moves atoms, and averaging over rotations is not a wrapper but the general
case: no averaging is the quadrature with one node.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coset.neighbors import Edges


@dataclass(frozen=True, kw_only=True, slots=True)
class Quadrature:
    """Rotations R_k with weights w_k that sum to 1: the same for all systems, or one set each.

    rotations: [nodes, 3, 3] or [nodes, systems, 3, 3]; weights: [nodes] or [nodes, systems].
    """

    rotations: Float[Tensor, "nodes *systems 3 3"]
    weights: Float[Tensor, "nodes *systems"]
    degree: int

    def per_system(self, n_systems: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations [nodes, systems, 3, 3] and weights [nodes, systems] in float64."""
        rotations, weights = self.rotations, self.weights
        if rotations.ndim == 3:
            rotations = rotations[:, None].expand(-1, n_systems, -1, -1)
            weights = weights[:, None].expand(-1, n_systems)
        return (
            rotations.to(like.device, torch.float64),
            weights.to(like.device, torch.float64),
        )

    def of(self, systems: Int[Tensor, " selected"]) -> "Quadrature":
        """The part for the given systems of a batch."""
        if self.rotations.ndim == 3:
            return self
        return replace(self, rotations=self.rotations[:, systems], weights=self.weights[:, systems])


IDENTITY = Quadrature(
    rotations=torch.eye(3, dtype=torch.float64)[None],
    weights=torch.ones(1, dtype=torch.float64),
    degree=0,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What the network computes: energy heads, of which each system uses one, and direct heads."""

    energy: tuple[str, ...] = ("energy",)
    direct_forces: str | None = None
    direct_stress: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The kept part of a graph, fixed before the network runs; every size that depends on data.

    kept: rows of the candidate graph that survive the pair cutoffs; graph: their own graph.
    weights: cutoff factors f_e in float64, twice differentiable in the edge vectors.
    tokens: for attention, rows [atoms of a class, width] into (centers, then kept edges), one array
    per class of similar width, padded with the center's own row; counts: real tokens of each row.
    place: for every token its row in the flattened classes.
    energies: energy of fixed pair terms per atom (eV), or None.
    """

    kept: Int[Tensor, " kept"]
    graph: Edges
    weights: Float[Tensor, " kept"]
    tokens: tuple[Int[Tensor, "members width"], ...]
    counts: tuple[Int[Tensor, " members"], ...]
    place: Int[Tensor, " tokens"]
    energies: Float[Tensor, " atoms"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Readout:
    """Raw predictions: eV and eV/Å, before baselines, division by volume and net-force removal.

    From `network` with a leading rotation axis, from `edge_gradient` averaged over it.
    """

    atomic_energies: Float[Tensor, "*rotations atoms"]
    direct_forces: Float[Tensor, "*rotations atoms 3"] | None = None
    direct_stress: Float[Tensor, "*rotations systems 3 3"] | None = None


class Exchange(Protocol):
    """The only two places where information crosses between atoms."""

    def reverse(
        self, messages: Float[Tensor, "rotations kept width"], graph: Edges
    ) -> Float[Tensor, "rotations kept width"]:
        """For edge (i, j, S) the message of (j, i, -S); the kept graph."""
        ...

    def to_neighbors(
        self, values: Float[Tensor, " atoms"], graph: Edges
    ) -> Float[Tensor, " edges"]:
        """For edge (i, j, S) the value of j; the candidate graph."""
        ...


class Indexing:
    """The plain exchange: all images of an atom are the same atom."""

    def reverse(
        self, messages: Float[Tensor, "rotations kept width"], graph: Edges
    ) -> Float[Tensor, "rotations kept width"]:
        """Message of the reverse edge."""
        reversed_messages: Tensor = _Reversal.apply(messages, graph.reverse)  # type: ignore[no-untyped-call]
        return reversed_messages

    def to_neighbors(
        self, values: Float[Tensor, " atoms"], graph: Edges
    ) -> Float[Tensor, " edges"]:
        """Value of the neighbor."""
        return values[graph.neighbors]


class _Reversal(torch.autograd.Function):
    """Rows by the reverse index, an involution: the backward pass is the same gather."""

    @staticmethod
    def forward(ctx: Any, messages: Tensor, reverse: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(reverse)
        return messages.index_select(1, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (reverse,) = ctx.saved_tensors
        return grad.index_select(1, reverse), None


INDEXING = Indexing()


class EdgeModel(Protocol):
    """A model of the energy as a function of edge vectors; `Pet` is one."""

    def geometry(
        self, edge_vectors: Float[Tensor, "edges 3"], graph: Edges, exchange: Exchange
    ) -> Geometry:
        """From candidate edges to kept ones; invariant under rotations."""
        ...

    def network(
        self,
        edge_vectors: Float[Tensor, "rotations kept 3"],
        geometry: Geometry,
        exchange: Exchange,
        outputs: Outputs,
        *,
        create_graph: bool,
    ) -> Readout:
        """Predictions for rotated edge vectors; with `create_graph` twice differentiable."""
        ...

    def memory_per_batch(self, n_atoms: int, n_edges: int) -> float:
        """Bytes that a gradient over so many atoms and candidate edges takes (estimate)."""
        ...


GradientTriple = tuple[Readout, Float[Tensor, "kept 3"], Float[Tensor, " kept"]]
NetworkGradient = Callable[..., GradientTriple]


def whole(
    model: EdgeModel,
    vectors: Float[Tensor, "kept 3"],
    geometry: Geometry,
    exchange: Exchange,
    outputs: Outputs,
    quadrature: Quadrature,
    *,
    create_graph: bool,
) -> GradientTriple:
    """Averaged readout, dE/dvectors and dE/dweights with all rotations in one call."""
    averaged = averaged_network(
        model, vectors, geometry, exchange, outputs, quadrature, create_graph=create_graph
    )
    by_vectors, by_weights = torch.autograd.grad(
        averaged.atomic_energies.sum(),
        (vectors, geometry.weights),
        create_graph=create_graph,
        materialize_grads=True,
    )
    return averaged, by_vectors, by_weights


def averaged_network(
    model: EdgeModel,
    vectors: Float[Tensor, "kept 3"],
    geometry: Geometry,
    exchange: Exchange,
    outputs: Outputs,
    quadrature: Quadrature,
    *,
    create_graph: bool = False,
) -> Readout:
    """Weighted mean of the network over the rotations, tensors turned back to the input frame."""
    graph = geometry.graph
    rotations, weights = quadrature.per_system(len(graph.charge), vectors)
    per_edge = rotations[:, graph.system_index[graph.centers]].to(vectors.dtype)
    rotated = (per_edge * vectors[:, None, :]).sum(-1)
    raw = model.network(rotated, geometry, exchange, outputs, create_graph=create_graph)
    per_atom = weights[:, graph.system_index]
    forces, stress = raw.direct_forces, raw.direct_stress
    if forces is not None:
        turn = per_atom[:, :, None, None] * rotations[:, graph.system_index]
        forces = torch.einsum("kaji,kaj->ai", turn, forces)
    if stress is not None:
        turned = weights[:, :, None, None] * rotations
        stress = torch.einsum("ksli,kslm,ksmj->sij", turned, stress, rotations)
    return Readout(
        atomic_energies=(per_atom * raw.atomic_energies).sum(0),
        direct_forces=forces,
        direct_stress=stress,
    )


def edge_gradient(
    model: EdgeModel,
    graph: Edges,
    edge_vectors: Float[Tensor, "edges 3"],
    quadrature: Quadrature = IDENTITY,
    *,
    outputs: Outputs | None = None,
    exchange: Exchange = INDEXING,
    create_graph: bool = False,
    network_gradient: NetworkGradient = whole,
) -> tuple[Readout, Float[Tensor, "edges 3"]]:
    """Weighted energy over the quadrature and its gradient g_e = dE/dr_e (eV/Å), zero if unused.

    Edge vectors that require a gradient are used as they are (callers differentiate g with respect
    to them), others are made a leaf. Without `create_graph` nothing returned carries a graph.
    """
    wanted = outputs or Outputs()
    with torch.enable_grad():
        r = edge_vectors if edge_vectors.requires_grad else edge_vectors.detach().requires_grad_()
        geometry = model.geometry(r, graph, exchange)
        vectors = r.index_select(0, geometry.kept)
        readout, by_vectors, by_weights = network_gradient(
            model, vectors, geometry, exchange, wanted, quadrature, create_graph=create_graph
        )
        ends, seeds = [vectors, geometry.weights], [by_vectors, by_weights]
        if geometry.energies is not None:
            ends.append(geometry.energies)
            seeds.append(torch.ones_like(geometry.energies))
        (gradient,) = torch.autograd.grad(
            ends, r, seeds, create_graph=create_graph, materialize_grads=True
        )
    full = _with_pair_energies(readout, geometry)
    return (full if create_graph else _detached(full)), gradient


def edge_energy(
    model: EdgeModel,
    graph: Edges,
    edge_vectors: Float[Tensor, "edges 3"],
    quadrature: Quadrature = IDENTITY,
    *,
    outputs: Outputs | None = None,
    exchange: Exchange = INDEXING,
) -> Readout:
    """The readout alone: no gradient is prepared or paid for."""
    with torch.no_grad():
        geometry = model.geometry(edge_vectors, graph, exchange)
        vectors = edge_vectors.index_select(0, geometry.kept)
        readout = averaged_network(
            model, vectors, geometry, exchange, outputs or Outputs(), quadrature
        )
        return _with_pair_energies(readout, geometry)


def forces_and_virial(
    edge_vectors: Float[Tensor, "edges 3"], gradient: Float[Tensor, "edges 3"], graph: Edges
) -> tuple[Float[Tensor, "atoms 3"], Float[Tensor, "systems 3 3"]]:
    """F_i = sum_(center i) g_e - sum_(neighbor i) g_e and the full W = sum_e r_e (x) g_e.

    W_ab = dE/de_ab for x -> x (1 + e) is not symmetrized: its antisymmetric part is the derivative
    of the energy under rigid rotation.
    """
    forces = gradient.new_zeros(len(graph.atomic_numbers), 3)
    forces = forces.index_add(0, graph.centers, gradient)
    forces = forces.index_add(0, graph.neighbors, gradient, alpha=-1)
    outer = edge_vectors[:, :, None] * gradient[:, None, :]
    virial = gradient.new_zeros(len(graph.charge), 3, 3)
    return forces, virial.index_add(0, graph.system_index[graph.centers], outer)


def stress_of(
    virial: Float[Tensor, "systems 3 3"], volume: Float[Tensor, " systems"]
) -> Float[Tensor, "systems 3 3"]:
    """Stress = sym(W)/V in eV/Å³; NaN where the volume is NaN."""
    return 0.5 * (virial + virial.mT) / volume[:, None, None]


def torque_of(virial: Float[Tensor, "systems 3 3"]) -> Float[Tensor, "systems 3"]:
    """torque_a = eps_abc W_bc: dE = n . torque dtheta under x -> exp(theta [n]x) x; eV/rad."""
    return torch.stack(
        [
            virial[:, 1, 2] - virial[:, 2, 1],
            virial[:, 2, 0] - virial[:, 0, 2],
            virial[:, 0, 1] - virial[:, 1, 0],
        ],
        dim=1,
    )


def _with_pair_energies(readout: Readout, geometry: Geometry) -> Readout:
    if geometry.energies is None:
        return readout
    return Readout(
        atomic_energies=readout.atomic_energies + geometry.energies,
        direct_forces=readout.direct_forces,
        direct_stress=readout.direct_stress,
    )


def _detached(readout: Readout) -> Readout:
    forces, stress = readout.direct_forces, readout.direct_stress
    return Readout(
        atomic_energies=readout.atomic_energies.detach(),
        direct_forces=None if forces is None else forces.detach(),
        direct_stress=None if stress is None else stress.detach(),
    )
