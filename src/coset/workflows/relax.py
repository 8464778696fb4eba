"""Relaxation of many structures at once, atoms and cell, with the symmetry group kept.

Every structure gets a status and a reason; a bad one never stops the others. With symmetry `keep`
the input is symmetrized once to its space, layer or point group, and forces and stress are
projected on it at every step, so positions and cell never leave the symmetric subspace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    join_properties,
    properties_of,
    select,
    split,
)
from coset.symmetry.adaptive import chosen_rules
from coset.symmetry.average import averaged_properties, merged
from coset.symmetry.crystal import (
    find_group,
    space_group_number,
    symmetrize,
    symmetry_warnings,
    trivial_group,
)
from coset.symmetry.primitive import Primitive, reduced, unreduced
from coset.symmetry.projection import Projector, make_projector
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.examination import examined
from coset.workflows.guards import Broken, collapsed, evaluate_sound, refuse, without_stress
from coset.workflows.optimizers import (
    OPTIMIZERS,
    OptimizerState,
    Point,
    select_state,
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
from coset.workflows.variables import Field, at_rest, full_virial, gradient, moved


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
        found = _Batch(potential, starts, chosen, observer).run()
        results.update(examined(potential, starts, found, chosen))
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
    given = one.to(torch.float64)
    cell, warnings = _cell(potential, given, fixed, settings)
    operations = torch.from_numpy(cell.group.cartesian_rotations)
    return Start(
        number=number,
        cell=cell,
        free=~fixed if cell.n_cells == 1 else torch.ones_like(cell.structures.atomic_numbers) > 0,
        given=given,
        pressure_GPa=settings.pressure_GPa,
        space_group=space_group_number(given, settings.symprec),
        rule=merged(
            chosen_rules(
                potential,
                cell.structures,
                operations,
                settings.level,
                settings.rotational_tolerance,
            )
        ),
        warnings=warnings,
    )


def _cell(
    potential: Potential,
    given: Structures,
    fixed: Bool[Tensor, " atoms"],
    settings: RelaxSettings,
) -> tuple[Primitive, tuple[str, ...]]:
    """The cell that relaxes, and warnings: symmetrized and primitive, if the group is kept."""
    if settings.symmetry == "free":
        return unreduced(given, trivial_group(given)), ()
    warnings = symmetry_warnings(given, settings.symprec)
    if bool(fixed.any()):  # fixed atoms must not be symmetrized away from where they are
        group = find_group(given, FINAL_SYMPREC, fixed=fixed)
        return unreduced(symmetrize(given, group), group), (*group.warnings, *warnings)
    group = find_group(given, settings.symprec)
    exact = symmetrize(given, group)
    return reduced(potential, exact, group, settings.symprec), (*group.warnings, *warnings)


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
            initial=concatenate([start.cell.structures for start in starts]),
            projector=make_projector(
                [start.group for start in starts], starts[0].given.cell.device
            ),
            free=torch.cat([start.free for start in starts]),
        )
        self.state: OptimizerState | None = None
        self.results: dict[int, Relaxation] = {}
        self.last: tuple[_Active, Evaluation] | None = None

    def run(self) -> dict[int, Relaxation]:
        """Evaluate and step until every system has a result."""
        init, optimizer_step = OPTIMIZERS[self.settings.optimizer]
        variables = at_rest(self.active.initial)
        for step in range(self.settings.max_steps + 1):
            evaluation = self._evaluate(variables, step)
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
            state, variables = optimizer_step(state, evaluation.point, self.settings.max_step)
            self.state = state
            variables = self._keep(going, variables)
        return self.results

    def _evaluate(self, variables: Field, step: int) -> Evaluation | None:
        """Evaluate all active systems; those that break are failed and dropped."""
        structures = moved(self.active.initial, variables)
        while broken := collapsed(structures, self.active.initial):
            variables = self._drop([broken], variables, step)
            if not self.active.starts:
                return None
            structures = moved(self.active.initial, variables)
        _, properties, faults = evaluate_sound(self._predict, structures)
        variables = self._drop(faults, variables, step)
        if properties is None:
            return None
        structures = moved(self.active.initial, variables)
        if self.settings.cell != "fixed" and (missing := without_stress(structures, properties)):
            variables = self._drop(missing, variables, step)
            return self._evaluate(variables, step) if self.active.starts else None
        evaluation = _evaluation(variables, structures, properties, self.active, self.settings)
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
        return self._evaluate(point.variables, step)

    def _drop(self, faults: list[Broken], variables: Field, step: int) -> Field:
        """Fail the broken systems, keep the others."""
        for place, code, reason in faults:
            self._fail(self.active.starts[place], code, reason, step)
        gone = {place for place, _, _ in faults}
        kept = [place for place in range(len(self.active.starts)) if place not in gone]
        return self._keep(torch.tensor(kept, dtype=torch.int64), variables)

    def _keep(self, kept: Int[Tensor, " kept"], variables: Field) -> Field:
        """Only the given places stay in the batch."""
        if len(kept) == len(self.active.starts):
            return variables
        if not len(kept):
            self.active = replace(self.active, starts=())
            return variables
        rows, index = atoms_of(self.active.initial, kept)
        self.active = self.active.select(kept)
        if self.state is not None:
            self.state = select_state(self.state, rows, kept, index)
        return variables.select(rows, kept, index)

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
                structures=start.cell.unfold(start.cell.structures),
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
        cells = [start.cell for start in self.active.starts]
        structures, properties = evaluation.structures, evaluation.properties
        if any(cell.n_cells > 1 for cell in cells):
            singles = zip(cells, split(structures), strict=True)
            own = [
                cell.unfold_properties(properties_of(properties, structures, place))
                for place, cell in enumerate(cells)
            ]
            structures = concatenate([cell.unfold(one) for cell, one in singles])
            properties = join_properties(own)
        return self.observer(
            Progress(
                step=step,
                n_done=len(self.results) + int(self._small(evaluation).sum()),
                systems=tuple(start.number for start in self.active.starts),
                structures=structures,
                properties=properties,
                max_force=evaluation.max_force,
                max_stress_GPa=evaluation.max_stress_GPa,
            )
        )


def _evaluation(
    variables: Field,
    structures: Structures,
    properties: Properties,
    active: _Active,
    settings: RelaxSettings,
) -> Evaluation:
    """Enthalpy with its projected gradient, and the residuals."""
    energy, forces = properties.energy, properties.forces
    assert energy is not None
    assert forces is not None
    forces = active.projector.forces(forces) * active.free[:, None]
    pressure = settings.pressure_GPa / GPA_PER_EV_PER_A3
    volume = structures.volume.nan_to_num(0.0)
    virial = torch.zeros_like(structures.cell)
    if properties.stress is not None:
        unit = torch.eye(3).to(structures.cell)
        work = full_virial(structures, properties) + pressure * volume[:, None, None] * unit
        virial = active.projector.stress(work)
    by_variables = gradient(active.initial, variables, forces, virial)
    strain = _along(settings.cell, by_variables.strain, structures)
    stress = _along(settings.cell, 0.5 * (virial + virial.mT), structures)
    norms = torch.linalg.vector_norm(forces, dim=1)
    longest = norms.new_zeros(len(structures))
    residual = stress.abs().amax((1, 2)) / structures.volume.nan_to_num(1.0)
    return Evaluation(
        structures=structures,
        properties=properties,
        point=Point(
            variables=variables,
            value=energy + pressure * volume,
            gradient=replace(by_variables, strain=strain),
        ),
        max_force=longest.scatter_reduce(0, structures.system_index, norms, "amax"),
        max_stress_GPa=residual * GPA_PER_EV_PER_A3,
    )


def _along(
    mode: str | None, strain: Float[Tensor, "systems 3 3"], structures: Structures
) -> Float[Tensor, "systems 3 3"]:
    """The part of a strain, or of its conjugate, that may relax; 0 unless periodic in 3D."""
    if mode == "fixed":
        return torch.zeros_like(strain)
    full = torch.where(structures.pbc.all(1)[:, None, None], strain, torch.zeros_like(strain))
    isotropic = full.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(3).to(full)
    return {"shape": full - isotropic, "volume": isotropic}.get(mode or "full", full)
