"""Relaxation of many structures at once, atoms and cell, with the symmetry group kept.

Every structure gets a status and a reason; a bad one never stops the others. With symmetry `keep`
the input is symmetrized once to its space, layer or point group, and forces and stress are
projected on it at every step, so positions and cell never leave the symmetric subspace.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coset.errors import StructureError
from coset.potential import Potential
from coset.structures import (
    Properties,
    Structures,
    atoms_of,
    concatenate,
    select,
    split,
)
from coset.symmetry.average import averaged_properties, merged
from coset.symmetry.crystal import (
    CrystalSymmetry,
    find_group,
    space_group_number,
    symmetrize,
    symmetry_warnings,
    trivial_group,
)
from coset.symmetry.projection import Projector, make_projector
from coset.symmetry.rules import level_rule
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.guards import Broken, collapsed, evaluate_sound, refuse, without_stress
from coset.workflows.optimizers import (
    OPTIMIZERS,
    Field,
    OptimizerState,
    Point,
    select_state,
    strain_length,
    worse,
)
from coset.workflows.relaxation import (
    Observer,
    Progress,
    Relaxation,
    RelaxSettings,
    Status,
)
from coset.workflows.relaxation_outcome import FINAL_SYMPREC, Evaluation, Start, outcome_of


@dataclass(frozen=True, kw_only=True, slots=True)
class _Active:
    """The systems still in the batch: where they started, how they are projected, which move."""

    starts: tuple[Start, ...]
    initial: Structures
    projector: Projector
    free: Bool[Tensor, " atoms"]

    def select(self, kept: Int[Tensor, " kept"]) -> "_Active":
        """The systems at the given places."""
        rows, _ = atoms_of(self.initial, kept)
        return _Active(
            starts=tuple(self.starts[k] for k in kept.tolist()),
            initial=select(self.initial, kept),
            projector=self.projector.select(kept),
            free=self.free[rows],
        )


def relax(
    potential: Potential,
    structures: Structures,
    settings: RelaxSettings | None = None,
    *,
    fixed: Bool[Tensor, " atoms"] | None = None,
    observer: Observer | None = None,
) -> list[Relaxation]:
    """Minimize E + pV of every structure; one result for each, in input order, whatever happens.

    fixed: atoms that only follow the cell. observer: called after each evaluation of the batch
    (progress, trajectories).
    """
    chosen = settings or RelaxSettings()
    frozen = torch.zeros_like(structures.atomic_numbers, dtype=torch.bool)
    if fixed is not None:
        frozen = fixed
    results: dict[int, Relaxation] = {}
    starts: list[Start] = []
    for number, one in enumerate(split(structures)):
        own = frozen[structures.system_index == number]
        try:
            starts.append(_start(potential, number, one, own, chosen))
        except StructureError as error:
            results[number] = Relaxation(
                status="rejected", code=error.code, reason=error.reason, structures=None
            )
    if starts:
        results.update(_Batch(potential, starts, chosen, observer).run())
    return [results[number] for number in range(len(structures))]


def _start(
    potential: Potential,
    number: int,
    one: Structures,
    fixed: Bool[Tensor, " atoms"],
    settings: RelaxSettings,
) -> Start:
    """The structure, symmetrized if its group is kept; raises a StructureError if it is refused."""
    refuse(potential, one, number)
    if settings.cell not in (None, "fixed") and not bool(one.pbc.all()):
        raise StructureError(
            f"cell relaxation {settings.cell!r} needs periodicity in 3D",
            code="CellNotPeriodic",
            structure_id=str(number),
            field="cell",
            hint="use --cell fixed",
        )
    given = exact = one.to(torch.float64)
    before = space_group_number(exact, settings.symprec)
    group: CrystalSymmetry = trivial_group(exact)
    warnings: tuple[str, ...] = ()
    if settings.symmetry == "keep":
        # Fixed atoms must not be symmetrized away from where they are.
        symprec = FINAL_SYMPREC if bool(fixed.any()) else settings.symprec
        group = find_group(exact, symprec, fixed=fixed if bool(fixed.any()) else None)
        warnings = (*group.warnings, *symmetry_warnings(exact, settings.symprec))
        exact = symmetrize(exact, group)
    return Start(
        number=number,
        structures=exact,
        group=group,
        free=~fixed,
        given=given,
        pressure_GPa=settings.pressure_GPa,
        space_group=before,
        rule=merged(level_rule(torch.from_numpy(group.cartesian_rotations), settings.level)),
        warnings=warnings,
    )


class _Batch:
    """The loop over evaluations; systems leave as soon as they are done."""

    def __init__(
        self,
        potential: Potential,
        starts: Sequence[Start],
        settings: RelaxSettings,
        observer: Observer | None,
    ) -> None:
        self.potential, self.settings, self.observer = potential, settings, observer
        self.active = _Active(
            starts=tuple(starts),
            initial=concatenate([start.structures for start in starts]),
            projector=make_projector(
                [start.group for start in starts], starts[0].structures.cell.device
            ),
            free=torch.cat([start.free for start in starts]),
        )
        self.state: OptimizerState | None = None
        self.results: dict[int, Relaxation] = {}
        self.last: tuple[_Active, Evaluation] | None = None

    def run(self) -> dict[int, Relaxation]:
        """Evaluate and step until every system has a result."""
        init, optimizer_step = OPTIMIZERS[self.settings.optimizer]
        structures = self.active.initial
        for step in range(self.settings.max_steps + 1):
            evaluation = self._evaluate(structures, step)
            if evaluation is None:
                break
            stop = self._report(evaluation, step)
            code = "Interrupted" if stop else "MaxSteps"
            stop = stop or step == self.settings.max_steps
            if stop and (better := self._better(evaluation, step)) is not None:
                evaluation = better
            self._leave(evaluation, step, code if stop else None)
            going = torch.nonzero(~self._small(evaluation))[:, 0]
            if stop or not len(going):
                break
            state = self.state or init(evaluation.point, self.settings.max_step)
            state, structures = optimizer_step(state, evaluation.point, self.settings.max_step)
            self.state = state
            structures = self._keep(going, structures)
        return self.results

    def _evaluate(self, structures: Structures, step: int) -> Evaluation | None:
        """Evaluate all active systems; those that break are failed and dropped."""
        while broken := collapsed(structures, self.active.initial):
            structures = self._drop([broken], structures, step)
            if not len(structures):
                return None
        _, properties, faults = evaluate_sound(self._predict, structures)
        structures = self._drop(faults, structures, step)
        if properties is None:
            return None
        if self.settings.cell != "fixed" and (missing := without_stress(structures, properties)):
            structures = self._drop(missing, structures, step)
            return self._evaluate(structures, step) if len(structures) else None
        evaluation = _evaluation(structures, properties, self.active, self.settings)
        self.last = self.active, evaluation
        return evaluation

    def _predict(self, structures: Structures, places: list[int]) -> Properties:
        rules = [self.active.starts[place].rule for place in places]
        return averaged_properties(self.potential, structures, rules)

    def _better(self, evaluation: Evaluation, step: int) -> Evaluation | None:
        """The accepted points again, for the systems whose last step would be taken back."""
        if self.state is None:
            return None
        taken_back = worse(evaluation.point, self.state.accepted)
        if not bool(taken_back.any()):
            return None
        point = self.state.accepted.where(taken_back, evaluation.point)
        return self._evaluate(point.structures, step)

    def _drop(self, faults: list[Broken], structures: Structures, step: int) -> Structures:
        """Fail the broken systems, keep the others."""
        for place, code, reason in faults:
            self._fail(self.active.starts[place], code, reason, step)
        gone = {place for place, _, _ in faults}
        kept = [place for place in range(len(structures)) if place not in gone]
        return self._keep(torch.tensor(kept, dtype=torch.int64), structures)

    def _keep(self, kept: Int[Tensor, " kept"], structures: Structures) -> Structures:
        """Only the given places stay in the batch."""
        if len(kept) == len(structures):
            return structures
        if not len(kept):
            return select(structures, kept)
        self.active = self.active.select(kept)
        if self.state is not None:
            self.state = select_state(self.state, kept)
        return select(structures, kept)

    def _small(self, evaluation: Evaluation) -> Bool[Tensor, " active"]:
        return (evaluation.max_force <= self.settings.force_tolerance) & (
            evaluation.max_stress_GPa <= self.settings.stress_tolerance_GPa
        )

    def _leave(self, evaluation: Evaluation, step: int, stopped: str | None) -> None:
        """Results of the systems that converged; of all, if the run is `stopped` for a reason."""
        for place, small in enumerate(self._small(evaluation).tolist()):
            if not small and stopped is None:
                continue
            force, stress = evaluation.max_force[place], evaluation.max_stress_GPa[place]
            reason = f"max force {float(force):.2g} eV/Å, max stress {float(stress):.2g} GPa"
            outcome: tuple[Status, str, str] = "converged", "", reason
            if not small:
                reason = f"{reason} after {step} steps: above the tolerance"
                outcome = "not_converged", stopped or "", reason
            start = self.active.starts[place]
            self.results[start.number] = outcome_of(
                start, evaluation, place, outcome, (step, step + 1)
            )

    def _fail(self, start: Start, code: str, reason: str, step: int) -> None:
        """A failed result with the last good geometry."""
        outcome: tuple[Status, str, str] = ("failed", code, reason)
        if self.last is None:
            self.results[start.number] = Relaxation(
                status="failed",
                code=code,
                reason=reason,
                structures=start.structures,
                space_group_before=start.space_group,
                warnings=start.warnings,
            )
            return
        active, evaluation = self.last
        place = [other.number for other in active.starts].index(start.number)
        self.results[start.number] = outcome_of(start, evaluation, place, outcome, (step - 1, step))

    def _report(self, evaluation: Evaluation, step: int) -> bool:
        """Whether the observer wants to stop."""
        if self.observer is None:
            return False
        return self.observer(
            Progress(
                step=step,
                n_done=len(self.results) + int(self._small(evaluation).sum()),
                systems=tuple(start.number for start in self.active.starts),
                structures=evaluation.point.structures,
                properties=evaluation.properties,
                max_force=evaluation.max_force,
                max_stress_GPa=evaluation.max_stress_GPa,
            )
        )


def _evaluation(
    structures: Structures, properties: Properties, active: _Active, settings: RelaxSettings
) -> Evaluation:
    """Enthalpy with its projected gradient, and the residuals."""
    energy, forces = properties.energy, properties.forces
    assert energy is not None
    assert forces is not None
    forces = active.projector.forces(forces) * active.free[:, None]
    pressure = settings.pressure_GPa / GPA_PER_EV_PER_A3
    volume = structures.volume.nan_to_num(0.0)
    residual = _stress_residual(structures, properties, active.projector, settings)
    length = strain_length(structures)[:, None, None]
    gradient = Field(
        atoms=-forces,
        strain=residual * volume[:, None, None] / length,
        system_index=structures.system_index,
    )
    norms = torch.linalg.vector_norm(forces, dim=1)
    longest = norms.new_zeros(len(structures))
    return Evaluation(
        properties=properties,
        point=Point(structures=structures, value=energy + pressure * volume, gradient=gradient),
        max_force=longest.scatter_reduce(0, structures.system_index, norms, "amax"),
        max_stress_GPa=residual.abs().amax((1, 2)) * GPA_PER_EV_PER_A3,
    )


def _stress_residual(
    structures: Structures, properties: Properties, projector: Projector, settings: RelaxSettings
) -> Float[Tensor, "systems 3 3"]:
    """Projected stress + pressure (eV/Å³) along the strains that may relax, 0 along the others."""
    mode = settings.cell or "full"
    if properties.stress is None or mode == "fixed":
        return torch.zeros_like(structures.cell)
    unit = torch.eye(3).to(structures.cell)
    periodic = structures.pbc.all(1)[:, None, None]
    stress = torch.where(periodic, properties.stress, torch.zeros_like(properties.stress))
    full = projector.stress(stress) + settings.pressure_GPa / GPA_PER_EV_PER_A3 * unit
    full = torch.where(periodic, full, torch.zeros_like(full))
    isotropic = full.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * unit
    return {"full": full, "shape": full - isotropic, "volume": isotropic}[mode]
