"""Optimizers for many systems at once, as (init, step) pairs over one state.

They minimize a function of `Field` variables; what these mean stands in `variables.py`. Every
quantity of one system is independent of the others in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coset.workflows.variables import Field

CURVATURE = 30.0
"""First guess of the second derivative of the energy, eV/Å²."""
HISTORY = 12
SMALLEST_TRUST = 1e-4
ENERGY_NOISE = 1e-5
"""eV per atom: a smaller rise may be rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Variables (Å) with the function that is minimized (eV) and its gradient (eV/Å)."""

    variables: Field
    value: Float[Tensor, " systems"]
    gradient: Field

    def where(self, chosen: Bool[Tensor, " systems"], other: "Point") -> "Point":
        """This point for the chosen systems, the other one elsewhere."""
        return Point(
            variables=self.variables.where(chosen, other.variables),
            value=torch.where(chosen, self.value, other.value),
            gradient=self.gradient.where(chosen, other.gradient),
        )

    def select(self, rows: Int[Tensor, " rows"], systems: Tensor, index: Tensor) -> "Point":
        """The given systems and their atoms."""
        return Point(
            variables=self.variables.select(rows, systems, index),
            value=self.value[systems],
            gradient=self.gradient.select(rows, systems, index),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerState:
    """What an optimizer remembers; L-BFGS uses the pairs and the trust radius, FIRE the velocity.

    steps, changes: last moves and changes of the gradient, oldest first; curvatures: their scalar
    product, 0 where the pair is not used. `accepted` is the last point worth going back to.
    """

    accepted: Point
    moved: Field | None
    trust: Float[Tensor, " systems"]
    steps: tuple[Field, ...] = ()
    changes: tuple[Field, ...] = ()
    curvatures: tuple[Tensor, ...] = ()
    velocity: Field | None = None
    time_step: Float[Tensor, " systems"] | None = None
    mixing: Float[Tensor, " systems"] | None = None
    downhill: Int[Tensor, " systems"] | None = None


def limited(step: Field, longest: Float[Tensor, " systems"]) -> Field:
    """The step, shortened where an atom or the strain moves farther than allowed."""
    return step.times((longest / step.largest().clamp_min(1e-300)).clamp_max(1.0))


def lbfgs_init(point: Point, max_step: float) -> OptimizerState:
    """No memory, full trust."""
    trust = torch.full_like(point.value, max_step)
    return OptimizerState(accepted=point, moved=None, trust=trust)


def lbfgs_step(
    state: OptimizerState, point: Point, max_step: float
) -> tuple[OptimizerState, Field]:
    """Limited-memory BFGS with a trust radius: next variables to evaluate.

    A step that raises both the value and the gradient is taken back, its system forgets its
    memory, and its trust radius is halved (J. Nocedal, Math. Comp. 35, 773 (1980)).
    """
    good = torch.ones_like(point.value, dtype=torch.bool)
    if state.moved is not None:
        good = ~worse(point, state.accepted)
        state = _remember(state, point, good)
        point = point.where(good, state.accepted)
    grown = (1.5 * state.trust).clamp_max(max_step)
    tried = state.trust if state.moved is None else state.moved.largest()
    shrunk = 0.5 * torch.minimum(tried, state.trust)
    trust = torch.where(good, grown, shrunk).clamp_min(SMALLEST_TRUST)
    step = limited(_lbfgs_direction(state, point.gradient), trust)
    state = replace(state, accepted=point, moved=step, trust=trust)
    return state, point.variables.plus(step)


def worse(new: Point, old: Point) -> Bool[Tensor, " systems"]:
    """Whether value and gradient both rose by more than rounding."""
    n_atoms = torch.bincount(old.variables.system_index, minlength=len(old.value))
    steeper = new.gradient.dot(new.gradient) > old.gradient.dot(old.gradient)
    return (new.value > old.value + ENERGY_NOISE * n_atoms) & steeper


def _remember(
    state: OptimizerState, point: Point, good: Bool[Tensor, " systems"]
) -> OptimizerState:
    """The newest pair added; systems whose step was bad forget all pairs."""
    assert state.moved is not None
    change = point.gradient.plus(state.accepted.gradient, -1.0)
    curvature = state.moved.dot(change)
    floor = 1e-8 * state.moved.dot(state.moved)
    usable = good & (curvature > floor)
    newest = torch.where(usable, curvature, torch.zeros_like(curvature))
    older = tuple(torch.where(good, c, torch.zeros_like(c)) for c in state.curvatures)
    return replace(
        state,
        steps=(*state.steps, state.moved)[-HISTORY:],
        changes=(*state.changes, _zeroed(change, usable))[-HISTORY:],
        curvatures=(*older, newest)[-HISTORY:],
    )


def _zeroed(field: Field, kept: Bool[Tensor, " systems"]) -> Field:
    zero = Field(
        atoms=torch.zeros_like(field.atoms),
        strain=torch.zeros_like(field.strain),
        system_index=field.system_index,
    )
    return field.where(kept, zero)


def _lbfgs_direction(state: OptimizerState, gradient: Field) -> Field:
    """-H g by the two-loop recursion; H starts from the newest usable pair, else 1/CURVATURE."""
    direction = gradient.times(-1.0)
    pairs = list(zip(state.steps, state.changes, state.curvatures, strict=True))
    factors = []
    for step, change, curvature in reversed(pairs):
        factor = _ratio(step.dot(direction), curvature)
        direction = direction.plus(change, -factor)
        factors.append(factor)
    scale = torch.full_like(state.trust, 1.0 / CURVATURE)
    for _, change, curvature in pairs:
        newer = _ratio(curvature, change.dot(change))
        scale = torch.where(curvature > 0.0, newer, scale)
    direction = direction.times(scale)
    for (step, change, curvature), factor in zip(pairs, reversed(factors), strict=True):
        back = _ratio(change.dot(direction), curvature)
        direction = direction.plus(step, factor - back)
    return direction


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator, 0 where the denominator is 0."""
    safe = torch.where(denominator > 0.0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0.0, numerator / safe, torch.zeros_like(numerator))


def fire_init(point: Point, max_step: float) -> OptimizerState:
    """At rest (E. Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006))."""
    trust = torch.full_like(point.value, max_step)
    return OptimizerState(
        accepted=point,
        moved=None,
        trust=trust,
        velocity=point.gradient.times(0.0),
        time_step=torch.full_like(trust, 0.1),
        mixing=torch.full_like(trust, 0.1),
        downhill=torch.zeros_like(trust, dtype=torch.int64),
    )


def fire_step(state: OptimizerState, point: Point, max_step: float) -> tuple[OptimizerState, Field]:
    """One step of FIRE with unit masses: v <- (1 - a) v + a |v| F/|F|, stopped when uphill."""
    assert state.velocity is not None
    assert state.time_step is not None
    assert state.mixing is not None
    assert state.downhill is not None
    force = point.gradient.times(-1.0)
    velocity = state.velocity
    ahead = force.dot(velocity) > 0.0
    speed = velocity.dot(velocity).sqrt()
    norm = force.dot(force).sqrt().clamp_min(1e-300)
    mixed = velocity.times(1.0 - state.mixing).plus(force, state.mixing * speed / norm)
    velocity = mixed.where(ahead, velocity.times(0.0))
    long_enough = ahead & (state.downhill > 5)
    faster = (state.time_step * 1.1).clamp_max(1.0)
    time_step = torch.where(long_enough, faster, state.time_step)
    moving = state.downhill.new_tensor(state.moved is not None, dtype=torch.bool)
    time_step = torch.where(ahead | ~moving, time_step, 0.5 * state.time_step)
    mixing = torch.where(long_enough, 0.99 * state.mixing, state.mixing)
    mixing = torch.where(ahead, mixing, torch.full_like(mixing, 0.1))
    velocity = velocity.plus(force, time_step)
    step = limited(velocity.times(time_step), torch.full_like(state.trust, max_step))
    state = replace(
        state,
        accepted=point,
        moved=step,
        velocity=velocity,
        time_step=time_step,
        mixing=mixing,
        downhill=torch.where(ahead, state.downhill + 1, torch.zeros_like(state.downhill)),
    )
    return state, point.variables.plus(step)


Init = Callable[[Point, float], OptimizerState]
Step = Callable[[OptimizerState, Point, float], tuple[OptimizerState, Field]]
OPTIMIZERS: dict[str, tuple[Init, Step]] = {
    "lbfgs": (lbfgs_init, lbfgs_step),
    "fire": (fire_init, fire_step),
}


def select_state(
    state: OptimizerState, rows: Int[Tensor, " rows"], systems: Tensor, index: Tensor
) -> OptimizerState:
    """The memory of the given systems and their atoms alone."""

    def field(value: Field | None) -> Field | None:
        return None if value is None else value.select(rows, systems, index)

    def per_system(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[systems]

    return OptimizerState(
        accepted=state.accepted.select(rows, systems, index),
        moved=field(state.moved),
        trust=state.trust[systems],
        steps=tuple(s.select(rows, systems, index) for s in state.steps),
        changes=tuple(s.select(rows, systems, index) for s in state.changes),
        curvatures=tuple(c[systems] for c in state.curvatures),
        velocity=field(state.velocity),
        time_step=per_system(state.time_step),
        mixing=per_system(state.mixing),
        downhill=per_system(state.downhill),
    )
