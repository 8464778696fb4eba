"""Lattice thermal conductivity of crystals, with symmetry kept and rotational errors.

Every crystal is relaxed in its space group and reduced to its primitive cell, whose group stays the
same from then on. Force constants of second and third order get all symmetries of the crystal in
every frame; phono3py turns them into conductivity.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from coset.errors import NotConvergedError, StructureError
from coset.potential import Potential
from coset.structures import Structures
from coset.symmetry.average import sample_rules
from coset.symmetry.crystal import find_group, symmetrize, trivial_group
from coset.symmetry.primitive import Primitive, primitive_cell
from coset.workflows.conductivity.by_phono3py import (
    Anharmonic,
    anharmonic,
    conventional_matrix,
    require_phono3py,
)
from coset.workflows.conductivity.results import (
    Conductivity,
    ConductivityResult,
    ConductivitySettings,
    Kappa,
)
from coset.workflows.conductivity.samples import Sample, displacement_sample, exact_sample
from coset.workflows.crystals import one_by_one
from coset.workflows.guards import INTERNAL, contained
from coset.workflows.observers import Observer, Step
from coset.workflows.phonons.mesh import Mesh, action_of, dense_mesh, is_compatible
from coset.workflows.relaxation import Relaxation

RELAXED_SYMPREC = 1e-5  # Å: a relaxed structure has its group exactly
INTEGER = 1e-6
MAX_NOISE_SHARE = 0.25  # of the resistance; a few frames tell it to about 0.1


def conductivity(
    potential: Potential,
    structures: Structures,
    settings: ConductivitySettings | None = None,
    *,
    observer: Observer | None = None,
    on_result: Callable[[int, Conductivity], None] | None = None,
) -> list[Conductivity]:
    """One result for each structure, in input order, whatever happens.

    on_result: told each as soon as it is known, with its place.

    Raises:
        MissingExtraError: phono3py is not installed.
        ConfigError: "ExactNeedsModel", derivatives `exact` with a potential that is no model.
    """
    require_phono3py()
    chosen = settings or ConductivitySettings()
    return one_by_one(
        potential,
        structures,
        chosen.tight(),
        lambda start, step: _from_start(potential, start, chosen, step),
        observer=observer,
        on_result=on_result,
    )


def _from_start(
    potential: Potential, start: Relaxation, settings: ConductivitySettings, step: Step
) -> Conductivity:
    if start.structures is None or start.status in ("rejected", "failed"):
        return Conductivity(
            status="rejected" if start.status == "rejected" else "failed",
            code=start.code,
            reason=start.reason,
            relaxation=start,
        )
    try:
        with contained():
            step("")
            found = _result(potential, start.structures, settings, step)
    except NotConvergedError as error:
        return Conductivity(
            status="not_converged", code=error.code, reason=error.reason, relaxation=start
        )
    except StructureError as error:
        as_given = settings.relaxation is None
        return Conductivity(
            status="rejected" if as_given and error.code != INTERNAL else "failed",
            code=error.code,
            reason=error.reason,
            relaxation=start,
        )
    return _judged(found, start, settings)


def _judged(
    found: ConductivityResult, start: Relaxation, settings: ConductivitySettings
) -> Conductivity:
    """The status of a result."""
    warnings = start.warnings
    before, after = start.space_group_before, found.space_group
    if before is not None and before != after:
        warnings = (*warnings, "SpaceGroupChanged")
    if found.noise_share is not None and found.noise_share.max() > MAX_NOISE_SHARE:
        warnings = (*warnings, "RotationalNoise")
    ended = partial(Conductivity, relaxation=start, result=found, warnings=warnings)
    if found.n_imaginary and not settings.allow_imaginary:
        return ended(
            status="not_converged",
            code="ImaginaryModes",
            reason=f"{found.n_imaginary} modes of the mesh are imaginary, down to "
            f"{found.lowest_THz:.3g} THz: the crystal is no minimum, or the supercell too small",
        )
    if found.n_imaginary:
        ended = partial(ended, warnings=(*warnings, "ImaginaryModesLeftOut"))
    if start.status == "not_converged":
        return ended(status="not_converged", code=start.code, reason=start.reason)
    return ended(status="ok")


def _result(
    potential: Potential, one: Structures, settings: ConductivitySettings, step: Step
) -> ConductivityResult:
    symprec = settings.symprec if settings.relaxation is None else RELAXED_SYMPREC
    group = find_group(one, symprec)
    primitive = primitive_cell(symmetrize(one, group), group)
    state = primitive.structures.to("cpu")
    large, larger = (
        supercell_matrix(primitive, multiples, edge)
        for multiples, edge in (
            (settings.supercell, settings.min_edge),
            (settings.supercell_fc2, settings.min_edge_fc2),
        )
    )
    mesh = _mesh(primitive, settings)
    crystal = anharmonic(state, large, larger, settings.born)
    samples = _samples(potential, primitive, crystal, settings, step)
    _set_mean(crystal, samples)
    lowest, n_imaginary = crystal.frequencies(mesh)
    residuals = [s.residual for s in samples if s.residual is not None]
    found = ConductivityResult(
        primitive=state,
        space_group=primitive.group.number,
        supercell=large,
        supercell_fc2=larger,
        mesh=mesh,
        method=settings.method,
        lowest_THz=lowest,
        n_imaginary=n_imaginary,
        n_evaluations=sum(s.n_evaluations for s in samples),
        anharmonic=crystal,
        residual_fc3=max(residuals, default=None),
    )
    if n_imaginary and not settings.allow_imaginary:
        return found
    kappa = _kappa(crystal, mesh, settings, step)
    return _with_errors(found, kappa, samples, settings, step)


def _samples(
    potential: Potential,
    primitive: Primitive,
    crystal: Anharmonic,
    settings: ConductivitySettings,
    step: Step,
) -> list[Sample]:
    samples, exact = [], settings.derivatives == "exact"
    # The displacements that symmetry asks for are few, and each breaks it: no rotation of the
    # crystal is made up for by another one of them.
    group = primitive.group if exact else trivial_group(primitive.structures)
    rules = sample_rules(primitive.structures, group, settings.average, settings.frames)
    for number, rule in enumerate(rules):

        def own(note: str, frame: int = number) -> None:
            step(f"frame {frame + 1} of {len(rules)}, {note}")

        amplitude, state = settings.amplitude, primitive.structures
        samples.append(
            exact_sample(potential, state, crystal, rule, amplitude, own)
            if exact
            else displacement_sample(potential, crystal, rule, amplitude, own)
        )
    return samples


def _kappa(crystal: Anharmonic, mesh: Mesh, settings: ConductivitySettings, step: Step) -> Kappa:
    return crystal.kappa(
        mesh,
        settings.temperatures,
        isotopes=settings.isotopes,
        boundary_um=settings.boundary_um,
        method=settings.method,
        step=step,
    )


def _with_errors(
    found: ConductivityResult,
    kappa: Kappa,
    samples: list[Sample],
    settings: ConductivitySettings,
    step: Step,
) -> ConductivityResult:
    """The result with kappa and, by leaving out one frame at a time (jackknife), its errors.

    Relative ones are measured on half the mesh. What differs from frame to frame scatters phonons
    on its own: it adds c/m to the resistance of the mean over m frames.
    """
    m, crystal = len(samples), found.anharmonic
    if m == 1:
        return replace(found, kappa=kappa)
    half = [(n + 1) // 2 for n in found.mesh]
    coarse = (half[0], half[1], half[2])

    def on_coarse(chosen: list[Sample]) -> Float[ndarray, "temperatures 3 3"]:
        _set_mean(crystal, chosen)
        return _kappa(crystal, coarse, settings, step).by_method[settings.method]

    without = [on_coarse(samples[:number] + samples[number + 1 :]) for number in range(m)]
    whole = _trace(on_coarse(samples))
    error, share = jackknife(np.array(without), whole)
    scale = _trace(kappa.by_method[settings.method]) / whole
    return replace(found, kappa=kappa, error=error * scale[:, None, None], noise_share=share)


def jackknife(
    without: Float[ndarray, "frames temperatures 3 3"], whole: Float[ndarray, " temperatures"]
) -> tuple[Float[ndarray, "temperatures 3 3"], Float[ndarray, " temperatures"]]:
    """Standard error of kappa, and the share of the resistance that more frames would take away.

    without: kappa of the mean over all frames but one. whole: trace of kappa of the mean over all.
    With W = 1/trace: bias of W = (m - 1) (mean_j W_without_j - W_whole).
    """
    m = len(without)
    ratios = [whole / _trace(one) for one in without]
    return np.std(without, axis=0) * (m - 1) ** 0.5, (m - 1) * (np.mean(ratios, axis=0) - 1.0)


def _trace(tensors: Float[ndarray, "temperatures 3 3"]) -> Float[ndarray, " temperatures"]:
    return np.asarray(np.trace(tensors, axis1=1, axis2=2))


def _set_mean(crystal: Anharmonic, samples: list[Sample]) -> None:
    crystal.set_force_constants(
        np.mean([s.second for s in samples], axis=0), np.mean([s.third for s in samples], axis=0)
    )


def supercell_matrix(
    primitive: Primitive, multiples: Mesh | None, min_edge: float
) -> Int[ndarray, "3 3"]:
    """Multiples of the input cell, or of the conventional one with edges of at least `min_edge`."""
    cell = primitive.structures.cell[0].cpu().numpy()
    if multiples is None:
        base = conventional_matrix(primitive.structures)
        edges = np.linalg.norm(base @ cell, axis=1)
        matrix = np.ceil(min_edge / edges - INTEGER).astype(np.int64)[:, None] * base
    else:
        matrix = np.array(multiples)[:, None] * primitive.matrix
    rows = matrix @ cell
    turned = rows @ primitive.group.cartesian_rotations @ np.linalg.inv(rows)
    if np.abs(turned - np.rint(turned)).max() > INTEGER:
        raise StructureError(
            f"supercell = {multiples} breaks the symmetry of the crystal",
            code="AsymmetricMesh",
            field="supercell",
            hint="give equal numbers along equivalent vectors of the input cell, or none",
        )
    return np.asarray(matrix)


def _mesh(primitive: Primitive, settings: ConductivitySettings) -> Mesh:
    action = action_of(primitive.structures, primitive.group)
    cell = primitive.structures.cell[0].cpu().numpy()
    mesh = settings.mesh or dense_mesh(cell, settings.spacing, action)
    if not is_compatible(mesh, action):
        raise StructureError(
            f"mesh = {mesh} breaks the symmetry of the primitive cell",
            code="AsymmetricMesh",
            field="mesh",
            hint="give equal numbers along equivalent vectors, or none",
        )
    return mesh
