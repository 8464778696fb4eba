"""Phonons of many crystals: frequencies with error bars, DOS, thermal properties, a verdict.

Every crystal is relaxed in its space group, reduced to its primitive cell, and gets a status and a
reason; a bad one never stops the others. Force constants come from exact derivatives of the model
at the wave vectors of a mesh, or from displacements in its supercell.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy import ndarray

from coset.edge_model import Quadrature
from coset.errors import NotConvergedError, StructureError
from coset.potential import ModelPotential, Potential
from coset.structures import Structures
from coset.symmetry.average import averaged_properties, merged, sample_rules
from coset.symmetry.crystal import find_group, symmetrize, trivial_group
from coset.symmetry.primitive import Primitive, primitive_cell, unreduced
from coset.workflows.crystals import one_by_one
from coset.workflows.guards import INTERNAL, contained
from coset.workflows.observers import Observer, Step
from coset.workflows.phonons.by_phonopy import (
    BandPath,
    band_path,
    check_polar_terms,
    standard_masses,
)
from coset.workflows.phonons.descent import Instability, Minimum, descend
from coset.workflows.phonons.dynamics import Dynamics, dynamics_of
from coset.workflows.phonons.interpolation import interpolation
from coset.workflows.phonons.mesh import (
    Action,
    Evaluate,
    Mesh,
    action_of,
    dense_mesh,
    irreducible_points,
    is_compatible,
    supercell_mesh,
)
from coset.workflows.phonons.modes import (
    Modes,
    errors_in_thz,
    in_thz,
    translation_residual,
)
from coset.workflows.phonons.results import (
    Bands,
    Dos,
    PhononResult,
    Phonons,
    PhononSettings,
)
from coset.workflows.phonons.samples import (
    BROKEN,
    Samples,
    displacement_samples,
    exact_evaluator,
    half_mesh,
    irreducible_samples,
    mass_roots,
    mesh_samples,
)
from coset.workflows.phonons.stability import Stability, verdict
from coset.workflows.phonons.thermal import thermal_properties
from coset.workflows.relaxation import TIGHT, Relaxation, RelaxSettings

RELAXED_SYMPREC = 1e-5

# Off every mesh: fractional parts of multiples of irrational numbers (a Kronecker sequence).
TEST_POINTS = np.mod(np.outer(np.arange(1, 9), (0.8191725134, 0.6710436067, 0.5497004779)), 1.0)


def phonons(
    potential: Potential,
    structures: Structures,
    settings: PhononSettings | None = None,
    *,
    observer: Observer | None = None,
    on_result: Callable[[int, Phonons], None] | None = None,
) -> list[Phonons]:
    """One result for each structure, in input order, whatever happens.

    on_result: told each as soon as it is known, with its place.

    Raises:
        ConfigError: method `exact` with a potential that is no model.
    """
    chosen = settings or PhononSettings()
    return one_by_one(
        potential,
        structures,
        _relaxation(chosen),
        lambda start, step: _phonons(potential, start, chosen, step),
        observer=observer,
        on_result=on_result,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Crystal:
    """A primitive cell at its minimum, with what acts on it."""

    primitive: Primitive
    action: Action
    masses: Float[ndarray, " atoms"]
    rules: tuple[Quadrature, ...]

    @property
    def cell(self) -> Float[ndarray, "3 3"]:
        """Lattice vectors."""
        return self.primitive.structures.cell[0].cpu().numpy()


def _phonons(
    potential: Potential, start: Relaxation, settings: PhononSettings, step: Step
) -> Phonons:
    """Phonons of a relaxed crystal, or of one that came as it is."""
    known = start if settings.relax else None
    if start.structures is None or start.status in ("rejected", "failed"):
        return Phonons(
            status="rejected" if start.status == "rejected" else "failed",
            code=start.code,
            reason=start.reason,
            relaxation=known,
        )
    try:
        with contained():
            step("")
            result = _result(potential, _crystal(start.structures, settings), settings, step)
    except NotConvergedError as error:
        return Phonons(
            status="not_converged", code=error.code, reason=error.reason, relaxation=known
        )
    except StructureError as error:
        return Phonons(
            status="failed" if settings.relax or error.code in (BROKEN, INTERNAL) else "rejected",
            code=error.code,
            reason=error.reason,
            relaxation=known,
        )
    return _judged(result, known, settings)


def _judged(
    result: PhononResult, relaxation: Relaxation | None, settings: PhononSettings
) -> Phonons:
    """The status of a result, with its warnings."""
    warnings = () if relaxation is None else relaxation.warnings
    error = result.interpolation_error_THz
    if error is not None and error > settings.interpolation_tolerance_THz:
        warnings = (*warnings, "InterpolationError")
    if result.thermal.imaginary_share > 0.0:
        warnings = (*warnings, "ImaginaryModesLeftOut")
    found = partial(Phonons, warnings=warnings, relaxation=relaxation, result=result)
    if relaxation is not None and relaxation.status == "not_converged":
        return found(status="not_converged", code=relaxation.code, reason=relaxation.reason)
    return found(status="ok")


def _relaxation(settings: PhononSettings) -> RelaxSettings | None:
    if not settings.relax:
        return None
    average = None if settings.average == "none" else settings.average
    return replace(TIGHT, symprec=settings.symprec, average=average)


def _crystal(one: Structures, settings: PhononSettings) -> _Crystal:
    """The primitive cell, with all its operations or, at level `none`, without any."""
    symprec = RELAXED_SYMPREC if settings.relax else settings.symprec
    group = find_group(one, symprec)
    exact = symmetrize(one, group)
    primitive = primitive_cell(exact, group)
    if len(primitive.group.pure_translations) > 1:
        raise StructureError(
            "a charged supercell has no primitive cell", code="ChargedCell", hint="reduce it first"
        )
    own = primitive.structures, primitive.group
    rules = sample_rules(*own, settings.average, settings.frames, settings.seed)
    if settings.average == "none":
        primitive = unreduced(primitive.structures, trivial_group(primitive.structures))
    return _Crystal(
        primitive=primitive,
        action=action_of(primitive.structures, primitive.group),
        masses=standard_masses(primitive.structures),
        rules=rules,
    )


def _result(
    potential: Potential, crystal: _Crystal, settings: PhononSettings, step: Step
) -> PhononResult:
    one, masses = crystal.primitive.structures, crystal.masses
    # What may be wrong with the settings comes before the work.
    path = band_path(one, settings.path)
    mesh = settings.mesh or dense_mesh(crystal.cell, settings.spacing, crystal.action)
    if not is_compatible(mesh, crystal.action):
        raise _asymmetric(mesh, "mesh")
    check_polar_terms(one, settings.born)
    energy = _energy(potential, crystal)
    samples, error, evaluate = _samples(potential, crystal, settings, step)
    step("verdict")
    dynamics = dynamics_of(one, samples, masses, settings.born)
    points, weights = irreducible_points(mesh, crystal.action)
    stability = Stability(
        potential=potential,
        primitive=crystal.primitive,
        action=crystal.action,
        rules=crystal.rules,
        dynamics=dynamics,
        evaluate=evaluate,
        supercell=samples.mesh,
        level=settings.average,
        step=step,
    )
    bands, found = _bands(dynamics, path)
    judged = verdict(stability, (path.q_points, found), points)
    listed, minima = tuple[Instability, ...](), tuple[Minimum, ...]()
    if settings.follow and judged.kind == "unstable":
        level = settings.average if settings.average in ("tight", "reference") else "standard"
        ends = path.q_points[np.unique(path.segments)]
        listed, minima = descend(stability, ends, level, settings.frames)
    frequency, states = dynamics.lattice.dos(mesh)
    gamma = samples.force_constants.sum(axis=1) / mass_roots(masses)
    return PhononResult(
        primitive=one,
        energy=energy,
        space_group=crystal.primitive.group.number,
        supercell=samples.mesh,
        mesh=mesh,
        bands=bands,
        dos=Dos(frequency_THz=frequency, states=states),
        thermal=thermal_properties(
            dynamics.sample_values(points), weights, np.array(settings.temperatures)
        ),
        verdict=judged,
        gamma_residual_THz=translation_residual(gamma.astype(complex), masses),
        lattice=dynamics.lattice,
        interpolation_error_THz=error,
        instabilities=listed,
        minima=minima,
    )


def _energy(potential: Potential, crystal: _Crystal) -> float:
    """The mean over the frames, eV per primitive cell."""
    properties = averaged_properties(
        potential, crystal.primitive.structures, [merged(crystal.rules)]
    )
    energy = properties.energy
    if energy is None or not bool(torch.isfinite(energy).all()):
        raise StructureError(
            "the potential returned an energy that is not finite",
            code=BROKEN,
            hint="check the structure",
        )
    return float(energy[0])


def _samples(
    potential: Potential, crystal: _Crystal, settings: PhononSettings, step: Step
) -> tuple[Samples, float | None, Evaluate | None]:
    """Force constants, their interpolation error, and what evaluates D(q) directly."""
    one, rules, action = crystal.primitive.structures, crystal.rules, crystal.action
    if settings.supercell is not None and not is_compatible(settings.supercell, action):
        raise _asymmetric(settings.supercell, "supercell")
    smallest = settings.supercell or supercell_mesh(crystal.cell, settings.min_edge, action)
    if settings.method == "displacements":
        told = _announced(rules, step)
        amplitude = settings.amplitude
        moved = displacement_samples(potential, crystal.primitive, told, smallest, amplitude)
        return moved, None, None
    evaluate = exact_evaluator(potential, one, rules, crystal.masses)
    model = potential
    if isinstance(potential, ModelPotential) and not settings.double:
        model = potential.single_precision()
    step("derivatives")
    if settings.quick:
        told = _announced(rules, step)
        found = irreducible_samples(model, one, told, smallest, action, crystal.masses)
        return found, None, evaluate
    exact = exact_evaluator(potential, one, rules[:1], crystal.masses)
    direct = in_thz(np.linalg.eigvalsh(exact(TEST_POINTS)[0]))
    single = exact_evaluator(model, one, rules[:1], crystal.masses)
    mesh, error, half = _converged_mesh(single, direct, crystal, settings)
    frames = [half]
    for rule in _announced(rules[1:], step):
        frames.append(exact_evaluator(model, one, [rule], crystal.masses)(half_mesh(mesh)))
    return (
        mesh_samples(np.concatenate(frames), mesh, action, crystal.masses),
        error,
        evaluate,
    )


def _announced(rules: Sequence[Quadrature], step: Step) -> Iterator[Quadrature]:
    for left, rule in zip(range(len(rules), 0, -1), rules, strict=True):
        step(f"frames to go: {left}")
        yield rule


def _converged_mesh(
    single: Evaluate,
    direct: Float[ndarray, "points branches"],
    crystal: _Crystal,
    settings: PhononSettings,
) -> tuple[Mesh, float, Complex[ndarray, "one half dim dim"]]:
    """The smallest supercell whose interpolation is good enough, tested in one frame.

    direct: frequencies (THz) at the test points. Returns also the interpolation error (THz), with
    what single precision adds to it, and D(q) of that frame at half of the mesh.
    """
    edge = settings.min_edge
    while True:
        mesh = settings.supercell or supercell_mesh(crystal.cell, edge, crystal.action)
        half = single(half_mesh(mesh))
        error = _interpolation_error(half, crystal, mesh, direct)
        edge = 1e-6 + float((np.array(mesh) * np.linalg.norm(crystal.cell, axis=1)).min())
        enough = error < settings.interpolation_tolerance_THz
        if enough or settings.supercell is not None or edge > settings.max_edge:
            return mesh, error, half


def _interpolation_error(
    half: Complex[ndarray, "one half dim dim"],
    crystal: _Crystal,
    mesh: Mesh,
    direct: Float[ndarray, "points branches"],
) -> float:
    """Largest difference of frequencies at the test points, in one frame before projection.

    Projection is a mean over stars of wave vectors, so that it only makes the error smaller.
    """
    raw = mesh_samples(half, mesh, None, crystal.masses)
    constants = raw.force_constants / mass_roots(crystal.masses)
    rough = interpolation(crystal.primitive.structures, mesh, constants).matrices(TEST_POINTS)[0]
    return float(np.abs(in_thz(np.linalg.eigvalsh(rough)) - direct).max())


def _bands(dynamics: Dynamics, path: BandPath) -> tuple[Bands, Modes]:
    directions = _directions(path)
    found = dynamics.modes(path.q_points, directions)
    known = len(dynamics.samples.blocks) > 1 or dynamics.doubt is not None
    error = errors_in_thz(found) if known else None
    return Bands(path=path, frequency_THz=in_thz(found.values), error_THz=error), found


def _directions(path: BandPath) -> Float[ndarray, "points 3"]:
    """Where the path goes from, or comes to, each of its points."""
    result = np.empty_like(path.q_points)
    for first, last in path.segments:
        result[first : last + 1] = path.q_points[last] - path.q_points[first]
    return result


def _asymmetric(mesh: Mesh, field: str) -> StructureError:
    return StructureError(
        f"{field} = {mesh} breaks the symmetry of the primitive cell",
        code="AsymmetricMesh",
        field=field,
        hint="give equal numbers along equivalent vectors, or none",
    )
