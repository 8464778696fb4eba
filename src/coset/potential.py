"""Potentials: what workflows, ASE and screening see; structures in, properties out.

`ModelPotential` binds an edge model to one energy target, a quadrature and a precision.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coset.edge_model import (
    IDENTITY,
    EdgeModel,
    Outputs,
    Quadrature,
    Readout,
    edge_energy,
    edge_gradient,
    forces_and_virial,
    stress_of,
    torque_of,
)
from coset.errors import ConfigError, StructureError
from coset.neighbors import MIN_DISTANCE, Edges, batched_neighbor_lists, edge_vectors
from coset.structures import Properties, Structures, join_properties, validate, wrap


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

    def check_supported(self, structures: Structures) -> None:
        """Raise a StructureError (with the number of the system) for what it cannot take."""
        ...

    def __call__(self, structures: Structures) -> Properties:
        """Predictions for every system; a StructureError names the system that broke."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelPotential:
    """An edge model bound to one energy target, a quadrature and a precision.

    baseline: eV per atom, indexed by atomic number. dtype: of edge vectors (the network keeps its
    own; positions are float64). forces: compute forces, stress and torque from the gradient.
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
        """Predictions for every system, in float64, on the device of the structures.

        Raises:
            StructureError: for the first system that this model cannot take.
        """
        plain = replace(
            structures, positions=structures.positions.detach(), cell=structures.cell.detach()
        )
        validate(plain)
        self.check_supported(plain)
        wrapped = wrap(plain.to(torch.float64)).to(self.baseline.device)
        share = self.memory / len(self.quadrature.weights)
        batches = batched_neighbor_lists(wrapped, self.cutoff, self.model.memory_per_batch, share)
        properties = join_properties([self._evaluate(*batch) for batch in batches])
        return properties.to(structures.cell.device)

    def single_precision(self) -> "ModelPotential":
        """The same with a float32 network; geometry keeps its precision."""
        if not isinstance(self.model, torch.nn.Module):
            return self
        return replace(self, model=deepcopy(self.model).to(torch.float32))

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
            f"element Z = {number} is unknown to model {self.name or 'given'}, "
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

    def _evaluate(
        self, systems: Int[Tensor, " systems"], structures: Structures, graph: Edges
    ) -> Properties:
        vectors = edge_vectors(structures, graph).to(self.dtype)
        _refuse_overlap(vectors, graph, systems)
        quadrature = self.quadrature.of(systems)
        if not self.forces:
            readout = edge_energy(self.model, graph, vectors, quadrature, outputs=self.outputs)
            return self._properties(structures, graph, readout)
        readout, gradient = edge_gradient(
            self.model, graph, vectors, quadrature, outputs=self.outputs
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
        message,
        code="BadCharge",
        structure_id=str(system),
        field="charge",
        hint=hint,
    )


def _refuse_overlap(
    vectors: Float[Tensor, "edges 3"], graph: Edges, systems: Int[Tensor, " systems"]
) -> None:
    if not len(vectors):
        return
    squared = (vectors.detach() ** 2).sum(1)
    nearest = int(squared.argmin())
    if float(squared[nearest]) >= MIN_DISTANCE**2:
        return
    system = int(systems[int(graph.system_index[graph.centers[nearest]])])
    raise StructureError(
        f"two atoms are {float(squared[nearest]) ** 0.5:.3g} Å apart, expected "
        f"at least {MIN_DISTANCE} Å",
        code="AtomsOverlap",
        structure_id=str(system),
        field="positions",
        hint="remove the duplicate site",
    )
