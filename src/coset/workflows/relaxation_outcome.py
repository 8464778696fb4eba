"""What is known about a structure while it relaxes, and what is said about it at the end."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coset.edge_model import Quadrature
from coset.structures import Properties, Structures, inverse_cell, properties_of, select
from coset.symmetry.certificate import certify
from coset.symmetry.crystal import CrystalSymmetry, find_group
from coset.symmetry.primitive import Primitive
from coset.symmetry.projection import make_projector
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.optimizers import Point
from coset.workflows.relaxation import Relaxation, Status

FINAL_SYMPREC = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One accepted structure, ready to relax.

    number: its place in the input. given: as it came. cell: what is relaxed, symmetrized and
    primitive if the group is kept. space_group: of the input, at symprec. rule: rotations of every
    evaluation.
    """

    number: int
    cell: Primitive
    free: Bool[Tensor, " atoms"]
    given: Structures
    pressure_GPa: float
    space_group: int | None
    rule: Quadrature
    warnings: tuple[str, ...]

    @property
    def group(self) -> CrystalSymmetry:
        """Group of the cell that is relaxed."""
        return self.cell.group


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A batched evaluation with the residuals that decide convergence (eV/Å, GPa)."""

    structures: Structures
    properties: Properties
    point: Point
    max_force: Float[Tensor, " active"]
    max_stress_GPa: Float[Tensor, " active"]


def outcome_of(
    start: Start,
    evaluation: Evaluation,
    place: int,
    outcome: tuple[Status, str, str],
    counts: tuple[int, int],
) -> Relaxation:
    """Everything said about one structure at the end; counts: steps and evaluations."""
    status, code, reason = outcome
    systems = torch.tensor([place])
    relaxed = select(evaluation.structures, systems)
    own = properties_of(evaluation.properties, evaluation.structures, place)
    one = start.cell.unfold(relaxed)
    warnings, found = start.warnings, find_group(relaxed, FINAL_SYMPREC)
    if found.order % start.group.order:
        warnings = (*warnings, "symmetry_lost")
    elif start.group.order > 1 and found.number != start.space_group:
        warnings = (*warnings, "symmetry_changed")
    projected, certificate = certify(own, make_projector([start.group], one.cell.device))
    projected = start.cell.unfold_properties(projected)
    stress = projected.stress
    return Relaxation(
        status=status,
        code=code,
        reason=reason,
        structures=one,
        properties=projected,
        n_steps=counts[0],
        n_evaluations=counts[1] * len(start.rule.weights),
        max_force=float(evaluation.max_force[place]),
        max_stress_GPa=_largest_stress(projected, start.pressure_GPa),
        pressure_GPa=float("nan")
        if stress is None
        else -float(stress[0].diagonal().mean()) * GPA_PER_EV_PER_A3,
        space_group_before=start.space_group,
        space_group_after=found.number,
        group_kept=start.group.name,
        rmsd=_rmsd(start.given, one),
        certificate=certificate and certificate.times(start.cell.n_cells),
        warnings=warnings,
    )


def _largest_stress(properties: Properties, external: float) -> float:
    """Largest component of stress + pressure, NaN where the stress is undefined."""
    if properties.stress is None:
        return float("nan")
    unit = torch.eye(3).to(properties.stress)
    residual = properties.stress[0] * GPA_PER_EV_PER_A3 + external * unit
    return float("nan") if bool(residual.isnan().any()) else float(residual.abs().max())


def _rmsd(before: Structures, after: Structures) -> float:
    """Root mean square displacement in Å, in the final cell, without strain and translation."""
    moved = after.positions - before.positions
    if bool(before.pbc.any()):
        inverse = inverse_cell(before.cell, before.pbc)[0]
        moved = after.positions - (
            before.positions @ inverse @ after.cell[0]
            + (before.positions - before.positions @ inverse @ before.cell[0])
        )
    moved = moved - moved.mean(0)
    return float((moved**2).sum(1).mean().sqrt())
