"""What is looked at once a relaxation has ended: rotational errors, and stability on request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coset.potential import ModelPotential, Potential
from coset.structures import concatenate
from coset.workflows.relaxation import Relaxation, RelaxSettings
from coset.workflows.relaxation_outcome import Start
from coset.workflows.rotational import N_FRAMES, rotational_errors
from coset.workflows.stability import stability

NOT_CHECKED = "stability_not_checked"


def examined(
    potential: Potential,
    starts: Sequence[Start],
    results: Mapping[int, Relaxation],
    settings: RelaxSettings,
) -> dict[int, Relaxation]:
    """The results with rotational errors where rotations were averaged, and stability if wanted."""
    done = dict(results)
    averaged = [s for s in starts if s.rule.degree > 0 and done[s.number].certificate is not None]
    if averaged:
        _add_errors(potential, averaged, done)
    if settings.check_stability:
        for start in starts:
            if done[start.number].status == "converged":
                done[start.number] = _with_stability(potential, start, done[start.number])
    return done


def _add_errors(potential: Potential, starts: Sequence[Start], done: dict[int, Relaxation]) -> None:
    cells = []
    for start in starts:
        relaxed = done[start.number].structures
        assert relaxed is not None
        cells.append(start.cell.fold(relaxed))
    rules, groups = [start.rule for start in starts], [start.group for start in starts]
    errors = rotational_errors(potential, concatenate(cells), groups, rules)
    for start, error in zip(starts, errors, strict=True):
        result = done[start.number]
        assert result.certificate is not None
        whole = error and replace(error, energy=start.cell.n_cells * error.energy)
        done[start.number] = replace(
            result,
            certificate=replace(result.certificate, rotational_error=whole),
            n_evaluations=result.n_evaluations + N_FRAMES * len(start.rule.weights),
        )


def _with_stability(potential: Potential, start: Start, result: Relaxation) -> Relaxation:
    """Fixed atoms and potentials without exact second derivatives are not checked."""
    assert result.structures is not None
    if not isinstance(potential, ModelPotential) or not bool(start.free.all()):
        return replace(result, warnings=(*result.warnings, NOT_CHECKED))
    found = stability(potential, start.cell.fold(result.structures), start.group, start.rule)
    return replace(result, stability=found)
