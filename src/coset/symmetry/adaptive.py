"""The cheapest average over rotations that keeps a tolerance, for one structure.

The anisotropy spectrum of the structure predicts what every rule leaves of the energy; the first
one below the tolerance is confirmed by random frames, else the next is tried.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from coset.edge_model import IDENTITY, Quadrature
from coset.potential import Potential
from coset.structures import Structures, concatenate
from coset.symmetry.average import averaged_properties, has_direct_heads, translated
from coset.symmetry.primitive import orientation
from coset.symmetry.rules import coset_rule, haar_offsets, level_rule
from coset.symmetry.spectrum import anisotropy_spectrum, highest_degree

AUTO = "auto"
TOLERANCE = 1e-4
"""eV per atom."""
DEGREES = (3, 5, 7, 9)
SPECTRUM_DEGREE = 8
N_FRAMES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A rule with the rms rotational error of its energy, eV: predicted, and found in frames.

    met: whether the found error is within the tolerance; n_evaluations: what the choice took.
    """

    rule: Quadrature
    predicted: float
    found: float
    met: bool
    n_evaluations: int


def chosen_rules(
    potential: Potential,
    one: Structures,
    operations: Float[Tensor, "operations 3 3"],
    level: str,
    tolerance: float,
) -> tuple[Quadrature, ...]:
    """The quadratures of a level (`level_rule`), or for `auto` the one that keeps the tolerance."""
    if level == AUTO:
        return (adaptive_rule(potential, one, operations, tolerance).rule,)
    direct = has_direct_heads(potential)
    return level_rule(operations, level, direct=direct, turn=orientation(one))


def adaptive_rule(
    potential: Potential,
    one: Structures,
    operations: Float[Tensor, "operations 3 3"],
    tolerance: float,
) -> Choice:
    """The smallest rule whose error of the energy is at most `tolerance` (eV per atom).

    The best rule known if none is good enough. one: symmetrized, its primitive cell if possible.

    Raises:
        ConfigError: the potential gives no torque.
    """
    limit = tolerance * len(one.atomic_numbers)
    degree = highest_degree(operations, SPECTRUM_DEGREE)
    spectrum = anisotropy_spectrum(potential, one, operations, max_degree=degree)
    turn = orientation(one)
    rules = [IDENTITY, *(coset_rule(operations, d, turn=turn) for d in DEGREES)]
    count, best = spectrum.n_evaluations, None
    for rule in _growing(rules):
        predicted = spectrum.residual(rule)
        if predicted > limit and rule.degree < DEGREES[-1]:
            continue
        found = _spread(potential, one, rule)
        count += N_FRAMES * len(rule.weights)
        best = Choice(
            rule=rule,
            predicted=predicted,
            found=found,
            met=found <= limit,
            n_evaluations=count,
        )
        if best.met:
            break
    assert best is not None
    return best


def _growing(rules: list[Quadrature]) -> list[Quadrature]:
    """Rules of different size, smallest first; of equal ones that of the higher degree."""
    by_size = {len(rule.weights): rule for rule in rules}
    return [by_size[size] for size in sorted(by_size)]


def _spread(potential: Potential, one: Structures, rule: Quadrature) -> float:
    """Standard deviation of the energy over random frames of a rule."""
    frames = [translated(rule, offset) for offset in haar_offsets(N_FRAMES, seed=1)]
    found = averaged_properties(potential, concatenate([one] * N_FRAMES), frames)
    assert found.energy is not None
    return float(torch.std(found.energy))
