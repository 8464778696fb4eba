"""Elastic constants from exact second derivatives, with the symmetry of the crystal and errors.

Every crystal is relaxed in its group and reduced to its primitive cell. The second derivatives in
displacements and strains are averaged over random frames, or over frames of the rule of a level,
and projected on the group *before* ions are eliminated: the constants are exactly symmetric. What
single frames give is their standard error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from coset.derivatives import StrainDerivatives
from coset.errors import ConfigError, NotConvergedError, StructureError, check_choice, check_range
from coset.potential import ModelPotential
from coset.structures import Structures, strain
from coset.symmetry.average import sample_rules
from coset.symmetry.crystal import CrystalSymmetry, find_group, symmetrize
from coset.symmetry.primitive import primitive_cell
from coset.symmetry.rules import LEVELS
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.crystals import one_by_one
from coset.workflows.elasticity.frames import Frames, evaluate_frames
from coset.workflows.elasticity.tensor import Moduli, moduli
from coset.workflows.guards import INTERNAL, contained
from coset.workflows.observers import Observer, Step
from coset.workflows.relaxation import TIGHT, Relaxation, RelaxSettings

PROJECTING = tuple(name for name, level in LEVELS.items() if level.projects)
GROUP_SYMPREC = 1e-5  # Å: a relaxed structure has its group exactly
GOOD_FORCE, GOOD_STRESS_GPA = 1e-5, 1e-3  # eV/Å: constants change by 1e-4 GPa
MAX_FORCE, MAX_STRESS_GPA = 1e-4, 0.01  # below, strain measures differ by 0.02 GPa
MAX_ROUNDS = 4
MIN_FRAMES = 3  # two leave an error almost unknown
MORE_FRAMES = 4  # times as many, if the sign of the softest mode asks for them
MAX_STEP, MAX_STRAIN = 0.1, 0.02  # Å and relative, of a Newton step


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticSettings:
    """What is computed, and how.

    ions: `relaxed` follow the strain to their minimum, `clamped` do not. relax: first to the
    minimum at this pressure; else the cell stays as it is. symprec: Å, to find the group. average:
    a level of `coset.symmetry.rules` that projects. frames: independent frames of it, whose scatter
    is the error; up to four times as many where they leave open whether the ions are at a minimum.
    """

    ions: Literal["relaxed", "clamped"] = "relaxed"
    relax: bool = True
    pressure_GPa: float = 0.0
    symprec: float = 1e-2
    average: str = "project"
    frames: int = 6

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check_choice("ions", self.ions, ("relaxed", "clamped"))
        check_choice("average", self.average, PROJECTING)
        check_range("frames", self.frames, MIN_FRAMES, 1000)
        if not self.relax and self.pressure_GPa != 0.0:
            raise ConfigError(
                f"pressure_GPa = {self.pressure_GPa} does nothing without relaxation",
                field="pressure_GPa",
            )
        self.relaxation()

    def relaxation(self) -> RelaxSettings:
        """How the crystal is relaxed first."""
        return replace(
            TIGHT,
            pressure_GPa=self.pressure_GPa,
            symprec=self.symprec,
            average=self.average,
            cell="full",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Elastic constants of one crystal, Voigt's notation, in the axes of its input.

    tensor: exactly symmetric; error: standard errors from the scatter of the frames, as all errors
    here. clamped: the tensor without relaxation of the ions. ions: what `tensor` is. measure:
    `energy`, second derivatives of the energy, or under a stress above 0.01 GPa `cauchy`,
    d stress/d strain (symmetrized). eigenvalues: of the tensor, ascending. born_stable: whether all
    are positive by three errors, None if that is undecided. bulk and shear errors: of Hill's means.
    symmetry_violation: largest component that the projection takes from the clamped constants of a
    frame. stress: of the final state. softest_mode: smallest eigenvalue of the Hessian without
    translations, eV/Å², infinite for one atom.
    """

    tensor_GPa: Float[Tensor, "6 6"]
    error_GPa: Float[Tensor, "6 6"]
    clamped_GPa: Float[Tensor, "6 6"]
    ions: Literal["relaxed", "clamped"]
    measure: Literal["energy", "cauchy"]
    eigenvalues_GPa: Float[Tensor, "6"]
    eigenvalue_errors_GPa: Float[Tensor, "6"]
    born_stable: bool | None
    moduli: Moduli
    bulk_error_GPa: float
    shear_error_GPa: float
    symmetry_violation_GPa: float
    stress_GPa: Float[Tensor, "3 3"]
    softest_mode: float
    n_frames: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Elasticity:
    """Outcome for one structure; `structures` is the final state of the input cell.

    energy: eV, of that cell.
    """

    status: Literal["ok", "not_converged", "rejected", "failed"]
    code: str = ""
    reason: str = ""
    constants: Constants | None = None
    structures: Structures | None = None
    energy: float = float("nan")
    space_group: int | None = None
    warnings: tuple[str, ...] = ()


def elastic(
    potential: ModelPotential,
    structures: Structures,
    settings: ElasticSettings | None = None,
    *,
    observer: Observer | None = None,
    on_result: Callable[[int, Elasticity], None] | None = None,
) -> list[Elasticity]:
    """Elastic constants of every crystal; one result for each, in input order, whatever happens.

    The potential should run in float64. on_result: told each result as soon as it is known, with
    its place.
    """
    chosen = settings or ElasticSettings()
    return one_by_one(
        potential,
        structures,
        chosen.relaxation() if chosen.relax else None,
        lambda start, step: _from_start(potential, start, chosen, step),
        observer=observer,
        on_result=on_result,
    )


def _from_start(
    potential: ModelPotential, start: Relaxation, settings: ElasticSettings, step: Step
) -> Elasticity:
    """Constants of a relaxed crystal; Newton steps may mend what has not converged."""
    if start.structures is None or start.status in ("rejected", "failed"):
        return Elasticity(
            status="rejected" if start.status == "rejected" else "failed",
            code=start.code,
            reason=start.reason,
            warnings=start.warnings,
        )
    try:
        with contained():
            step("")
            found = _elasticity(potential, start.structures, settings)
    except NotConvergedError as error:
        return Elasticity(status="not_converged", code=error.code, reason=error.reason)
    except StructureError as error:
        ours = settings.relax or error.code == INTERNAL
        refused: Literal["failed", "rejected"] = "failed" if ours else "rejected"
        return Elasticity(status=refused, code=error.code, reason=error.reason)
    return replace(found, warnings=start.warnings)


def _elasticity(
    potential: ModelPotential, one: Structures, settings: ElasticSettings
) -> Elasticity:
    """Constants of a crystal near its minimum."""
    group = find_group(one, GROUP_SYMPREC if settings.relax else settings.symprec)
    primitive = primitive_cell(symmetrize(one, group), group)
    start = primitive.structures
    state, frames = _stationary(potential, start, primitive.group, settings, settings.frames)
    most = MORE_FRAMES * settings.frames if settings.ions == "relaxed" else settings.frames
    while frames.softest_sign == 0 and len(frames.each) < most:
        count = 2 * len(frames.each)
        state, frames = _stationary(potential, state, primitive.group, settings, count)
    code, reason = _fault(frames, settings)
    return Elasticity(
        status="not_converged" if code else "ok",
        code=code,
        reason=reason,
        constants=_constants(frames, settings),
        structures=primitive.unfold(state),
        energy=float(frames.mean.energy) * primitive.n_cells,
        space_group=primitive.group.number,
    )


def _stationary(
    potential: ModelPotential,
    state: Structures,
    group: CrystalSymmetry,
    settings: ElasticSettings,
    count: int,
) -> tuple[Structures, Frames]:
    """The crystal after Newton steps to where the mean over `count` frames has its minimum.

    A relaxation with level `project` ends where a single frame has it.
    """
    rules = sample_rules(state, group, settings.average, count)
    frames = evaluate_frames(potential, state, group, rules)
    for _ in range(MAX_ROUNDS):
        if frames.softest_mode()[0] <= 0.0 or _is_stationary(
            frames, settings, GOOD_FORCE, GOOD_STRESS_GPA
        ):
            break
        moved, change = frames.newton_step(settings.pressure_GPa, cell=settings.relax)
        if float(moved.abs().max()) > MAX_STEP or float(change.abs().max()) > MAX_STRAIN:
            break
        displaced = replace(state, positions=state.positions + moved.to(state.positions))
        state = strain(displaced, change.to(state.cell)[None])
        frames = evaluate_frames(potential, state, group, rules)
    return state, frames


def _is_stationary(
    frames: Frames, settings: ElasticSettings, force: float, stress_GPa: float
) -> bool:
    """Whether forces, and the stress where it may relax, are below these limits."""
    moves = settings.relax or settings.ions == "relaxed"
    if moves and frames.max_force > force:
        return False
    return not settings.relax or _excess_stress_GPa(frames, settings) <= stress_GPa


def _excess_stress_GPa(frames: Frames, settings: ElasticSettings) -> float:  # noqa: N802
    """Largest component of stress + pressure."""
    external = settings.pressure_GPa * torch.eye(3, dtype=torch.float64)
    return float((frames.stress * GPA_PER_EV_PER_A3 + external).abs().max())


def _fault(frames: Frames, settings: ElasticSettings) -> tuple[str, str]:
    """Code and reason if the constants are not those of a minimum, else empty."""
    if settings.ions == "relaxed":
        value, error = frames.softest_mode()
        mode = f"the softest optical mode has {value:.3g} ± {error:.2g} eV/Å²"
        if frames.softest_sign < 0:
            return (
                "UnstableMode",
                f"{mode}: the ions are at no minimum, so that only clamped constants are given",
            )
        if frames.softest_sign == 0:
            return (
                "UndecidedMode",
                f"{mode}, and {len(frames.each)} frames tell its sign only beyond "
                f"{frames.quantile:.2g} errors: only clamped constants are given; take more frames",
            )
    if _is_stationary(frames, settings, MAX_FORCE, MAX_STRESS_GPA):
        return "", ""
    return (
        "NotStationary",
        f"forces of {frames.max_force:.2g} eV/Å remain, and a stress off by "
        f"{_excess_stress_GPa(frames, settings):.2g} GPa",
    )


def _constants(frames: Frames, settings: ElasticSettings) -> Constants:
    relaxed = settings.ions == "relaxed" and frames.softest_sign > 0
    stress = frames.stress * GPA_PER_EV_PER_A3
    cauchy = float(stress.abs().max()) > MAX_STRESS_GPA

    def constants(found: StrainDerivatives, *, relaxed: bool) -> Tensor:
        return frames.constants(found, relaxed=relaxed, cauchy=cauchy) * GPA_PER_EV_PER_A3

    tensor = constants(frames.mean, relaxed=relaxed)
    each = [constants(one, relaxed=relaxed) for one in frames.each]
    values, vectors = torch.linalg.eigh(tensor)
    own = [torch.einsum("im,ij,jm->m", vectors, one, vectors) for one in each]
    spread = frames.error_of(own)
    margin = frames.quantile * spread
    stable, unstable = bool((values > margin).all()), bool((values < -margin).any())
    hill = [moduli(one) for one in each]
    return Constants(
        tensor_GPa=tensor,
        error_GPa=frames.error_of(each),
        clamped_GPa=constants(frames.mean, relaxed=False),
        ions="relaxed" if relaxed else "clamped",
        measure="cauchy" if cauchy else "energy",
        eigenvalues_GPa=values,
        eigenvalue_errors_GPa=spread,
        born_stable=None if stable == unstable else stable,
        moduli=moduli(tensor),
        bulk_error_GPa=float(frames.error_of([values.new_tensor(m.bulk_GPa) for m in hill])),
        shear_error_GPa=float(frames.error_of([values.new_tensor(m.shear_GPa) for m in hill])),
        symmetry_violation_GPa=frames.violation_GPa,
        stress_GPa=stress,
        softest_mode=frames.softest_mode()[0],
        n_frames=len(frames.each),
    )
