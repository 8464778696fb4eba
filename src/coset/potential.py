"""The seam on which everything stands: energies and gradients with respect to edge vectors.

A model sees only edge vectors r_e, so whatever this package does (rotations, Bloch phases, Hessians,
chunks, training) acts there. The model is split in two: `geometry` (which edges, with what weight:
rotation invariant) and `network` (the energy of rotated edge vectors). `edge_gradient` joins them:

    g_e = dE/dr_e = sum_k w_k R_k^T dE/d(R_k r_e) + (dE/df) df/dr_e

Nothing below `Potential` moves atoms, and averaging over rotations is not a wrapper but the general
case: no averaging is the quadrature with one node.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coset.errors import ConfigError, StructureError
from coset.neighbors import MIN_DISTANCE, Edges, batched_neighbor_lists, edge_vectors
from coset.structures import Properties, Structures, validate, wrap


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
        return messages[:, graph.reverse]

    def to_neighbors(
        self, values: Float[Tensor, " atoms"], graph: Edges
    ) -> Float[Tensor, " edges"]:
        """Value of the neighbor."""
        return values[graph.neighbors]


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
    rotated = torch.einsum("keij,ej->kei", per_edge, vectors)
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
        vectors = r[geometry.kept]
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
        vectors = edge_vectors[geometry.kept]
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
    """stress = sym(W)/V in eV/Å³; NaN where the volume is NaN."""
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


class Potential(Protocol):
    """What workflows, ASE and screening see."""

    @property
    def cutoff(self) -> float:
        """Longest edge, Å."""
        ...

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers it knows."""
        ...

    @property
    def level_of_theory(self) -> str:
        """What its energies approximate."""
        ...

    def __call__(self, structures: Structures) -> Properties:
        """Predictions for every system."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelPotential:
    """An edge model bound to one energy target, a quadrature and a precision.

    baseline: eV per atom, indexed by atomic number. dtype: of positions and edge vectors (the
    network keeps its own). forces: compute forces, stress and torque from the gradient.
    conditioned: (max charge, max spin multiplicity), or None if the model knows neither.
    memory: bytes that one batch may take; longer inputs are cut.
    """

    model: EdgeModel
    cutoff: float
    elements: frozenset[int]
    baseline: Float[Tensor, " numbers"]
    name: str = ""
    level_of_theory: str = ""
    outputs: Outputs = field(default_factory=Outputs)
    quadrature: Quadrature = IDENTITY
    dtype: torch.dtype = torch.float64
    forces: bool = True
    conditioned: tuple[int, int] | None = None
    ignore_charge: bool = False
    memory: float = 2e9

    def __call__(self, structures: Structures) -> Properties:
        """Predictions for every system, in float64.

        Raises:
            StructureError: for the first system that this model cannot take.
        """
        validate(structures)
        self.check_supported(structures)
        wrapped = wrap(structures.to(torch.float64)).to(self.baseline.device)
        budget = max(int(self.memory / self.model.memory_per_batch(0, 1)), 1)
        batches = batched_neighbor_lists(wrapped, self.cutoff, budget)
        return _joined([self._evaluate(batch, graph) for _, batch, graph in batches])

    def check_supported(self, structures: Structures) -> None:
        """Raise a StructureError for elements, charges or spins that this model does not know."""
        for check in (self._species_error, self._conditioning_error):
            if error := check(structures):
                raise error

    def _species_error(self, structures: Structures) -> StructureError | None:
        known = torch.zeros(len(self.baseline), dtype=torch.bool)
        known[torch.tensor(sorted(self.elements))] = True
        unknown = ~known[structures.atomic_numbers.cpu().clamp(0, len(known) - 1)]
        if not bool(unknown.any()):
            return None
        atom = int(torch.nonzero(unknown)[0])
        system = int(structures.system_index[atom])
        number = int(structures.atomic_numbers[atom])
        return StructureError(
            f"structure {system}: element Z = {number} is unknown to model {self.name or 'given'}, "
            f"which knows {ranges(self.elements)}",
            code="UnknownElement",
            structure_id=str(system),
            field="atomic_numbers",
            hint="coset info shows the elements of a model",
        )

    def _conditioning_error(self, structures: Structures) -> StructureError | None:
        if self.conditioned is None:
            if self.ignore_charge or not bool(structures.charge.any()):
                return None
            system = int(torch.nonzero(structures.charge)[0])
            message = f"charge {int(structures.charge[system])}, but the model knows no charges"
            return _charge_error(system, message, "pass --ignore-charge to evaluate it as neutral")
        most, highest = self.conditioned
        bad = (structures.charge.abs() > most) | (structures.spin_multiplicity > highest)
        bad |= structures.spin_multiplicity < 1
        if not bool(bad.any()):
            return None
        system = int(torch.nonzero(bad)[0])
        message = (
            f"charge {int(structures.charge[system])} and spin multiplicity "
            f"{int(structures.spin_multiplicity[system])} are out of range"
        )
        return _charge_error(system, message, f"|charge| <= {most}, 1 <= multiplicity <= {highest}")

    def _evaluate(self, structures: Structures, graph: Edges) -> Properties:
        cast = structures.to(self.dtype)
        vectors = edge_vectors(cast, graph)
        _refuse_overlap(vectors, graph)
        if not self.forces:
            readout = edge_energy(
                self.model, graph, vectors, self.quadrature, outputs=self.outputs
            )
            return self._properties(structures, graph, readout)
        readout, gradient = edge_gradient(
            self.model, graph, vectors, self.quadrature, outputs=self.outputs
        )
        forces, virial = forces_and_virial(vectors.double(), gradient.double(), graph)
        return self._properties(structures, graph, readout, forces, virial)

    def _properties(
        self,
        structures: Structures,
        graph: Edges,
        readout: Readout,
        forces: Float[Tensor, "atoms 3"] | None = None,
        virial: Float[Tensor, "systems 3 3"] | None = None,
    ) -> Properties:
        atomic = readout.atomic_energies + self.baseline[graph.atomic_numbers]
        energy = atomic.new_zeros(len(structures)).index_add(0, graph.system_index, atomic)
        volume = structures.volume
        direct_forces, direct_stress = readout.direct_forces, readout.direct_stress
        if direct_forces is not None:
            direct_forces = without_net_force(direct_forces, structures)
        if direct_stress is not None:
            direct_stress = stress_of(direct_stress, volume)
        return Properties(
            energy=energy,
            atomic_energies=atomic,
            forces=forces,
            stress=None if virial is None else stress_of(virial, volume),
            torque=None if virial is None else torque_of(virial),
            direct_forces=direct_forces,
            direct_stress=direct_stress,
        )


def without_net_force(
    forces: Float[Tensor, "atoms 3"], structures: Structures
) -> Float[Tensor, "atoms 3"]:
    """Forces less their mean over each system."""
    sums = forces.new_zeros(len(structures), 3).index_add(0, structures.system_index, forces)
    return forces - (sums / structures.n_atoms[:, None])[structures.system_index]


def ranges(numbers: frozenset[int]) -> str:
    """Sorted numbers with runs joined: 1-3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in parts)


def pick_target(available: tuple[str, ...], wanted: str | None) -> str:
    """The energy target to use: the one named, or the only one.

    Raises:
        ConfigError: several and none chosen, or a name that the model does not have.
    """
    if wanted is None and len(available) == 1:
        return available[0]
    listed = ", ".join(available) or "none"
    if wanted is None:
        raise ConfigError(
            f"the model has several energy targets ({listed}) and none was chosen",
            code="TargetNotChosen",
            field="target",
            hint="choose one with --target NAME",
        )
    if wanted not in available:
        raise ConfigError(
            f"target {wanted!r} is not one of the model's energy targets: {listed}",
            code="UnknownTarget",
            field="target",
        )
    return wanted


def _charge_error(system: int, message: str, hint: str) -> StructureError:
    return StructureError(
        f"structure {system}: {message}",
        code="BadCharge",
        structure_id=str(system),
        field="charge",
        hint=hint,
    )


def _refuse_overlap(vectors: Float[Tensor, "edges 3"], graph: Edges) -> None:
    if not len(vectors):
        return
    squared = (vectors.detach() ** 2).sum(1)
    nearest = int(squared.argmin())
    if float(squared[nearest]) >= MIN_DISTANCE**2:
        return
    system = int(graph.system_index[graph.centers[nearest]])
    raise StructureError(
        f"structure {system}: two atoms are {float(squared[nearest]) ** 0.5:.3g} Å apart, expected "
        f"at least {MIN_DISTANCE} Å",
        code="AtomsOverlap",
        structure_id=str(system),
        field="positions",
        hint="remove the duplicate site",
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


def _joined(parts: list[Properties]) -> Properties:
    """Properties of consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Properties(**{name: join(name) for name in Properties.__slots__})
