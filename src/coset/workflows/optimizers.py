"""Optimizers for many systems at once, as (init, step) pairs over one state.

Atoms and cell move together: x -> (x + u) exp(strain), cell -> cell exp(strain). The strain is a
logarithmic one relative to the *current* cell (a moving reference), so its gradient is always that
at zero strain, V (stress + pressure), and no step can turn a cell inside out.

Every quantity of one system is independent of the others in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coset.structures import Structures, atoms_of, deform, select

CURVATURE = 70.0
"""First guess of the second derivative of the energy, eV/Å²."""
STRAIN_LENGTH = 1.0
"""Å per square root of an atom: turns a strain into a length of about the same stiffness."""
HISTORY = 12
SMALLEST_TRUST = 1e-4
ENERGY_NOISE = 1e-5
"""eV per atom: a smaller rise may be rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One vector per system: displacements of atoms (Å) and strain times its length (Å).

    Also gradients with respect to them (eV/Å).
    """

    atoms: Float[Tensor, "atoms 3"]
    strain: Float[Tensor, "systems 3 3"]
    system_index: Int[Tensor, " atoms"]

    def dot(self, other: "Field") -> Float[Tensor, " systems"]:
        """Scalar product of each system."""
        by_strain: Tensor = (self.strain * other.strain).sum((1, 2))
        by_atom = (self.atoms * other.atoms).sum(1)
        return by_strain.index_add(0, self.system_index, by_atom)

    def plus(self, other: "Field", factor: Float[Tensor, " systems"] | float = 1.0) -> "Field":
        """Self + factor * other, with one factor per system."""
        scaled = other.times(factor)
        return replace(self, atoms=self.atoms + scaled.atoms, strain=self.strain + scaled.strain)

    def times(self, factor: Float[Tensor, " systems"] | float) -> "Field":
        """Every system times its factor."""
        if isinstance(factor, float):
            return replace(self, atoms=self.atoms * factor, strain=self.strain * factor)
        return replace(
            self,
            atoms=self.atoms * factor[self.system_index, None],
            strain=self.strain * factor[:, None, None],
        )

    def where(self, chosen: Bool[Tensor, " systems"], other: "Field") -> "Field":
        """This field for the chosen systems, the other one elsewhere (NaN does not leak)."""
        return replace(
            self,
            atoms=torch.where(chosen[self.system_index, None], self.atoms, other.atoms),
            strain=torch.where(chosen[:, None, None], self.strain, other.strain),
        )

    def largest(self) -> Float[Tensor, " systems"]:
        """Longest atomic vector or norm of the strain part of each system."""
        longest: Tensor = torch.linalg.matrix_norm(self.strain)
        lengths = torch.linalg.vector_norm(self.atoms, dim=1)
        return longest.scatter_reduce(0, self.system_index, lengths, "amax")

    def select(self, rows: Int[Tensor, " atoms"], systems: Tensor, index: Tensor) -> "Field":
        """The given systems and their atoms."""
        return Field(atoms=self.atoms[rows], strain=self.strain[systems], system_index=index)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Structures with the function that is minimized (eV) and its gradient (eV/Å)."""

    structures: Structures
    value: Float[Tensor, " systems"]
    gradient: Field

    def where(self, chosen: Bool[Tensor, " systems"], other: "Point") -> "Point":
        """This point for the chosen systems, the other one elsewhere."""
        by_atom = chosen[self.structures.system_index, None]
        structures = replace(
            self.structures,
            positions=torch.where(by_atom, self.structures.positions, other.structures.positions),
            cell=torch.where(chosen[:, None, None], self.structures.cell, other.structures.cell),
        )
        return Point(
            structures=structures,
            value=torch.where(chosen, self.value, other.value),
            gradient=self.gradient.where(chosen, other.gradient),
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


def strain_length(structures: Structures) -> Float[Tensor, " systems"]:
    """Length in Å by which strains are multiplied: c sqrt(atoms)."""
    return STRAIN_LENGTH * structures.n_atoms.to(structures.cell).sqrt()


def move(structures: Structures, step: Field) -> Structures:
    """X -> (x + u) exp(strain), cell -> cell exp(strain)."""
    strain = step.strain / strain_length(structures)[:, None, None]
    deformation = torch.linalg.matrix_exp(strain)
    displaced = replace(structures, positions=structures.positions + step.atoms)
    return deform(displaced, deformation)


def limited(step: Field, longest: Float[Tensor, " systems"]) -> Field:
    """The step, shortened where an atom or the strain moves farther than allowed."""
    return step.times((longest / step.largest().clamp_min(1e-300)).clamp_max(1.0))


def lbfgs_init(point: Point, max_step: float) -> OptimizerState:
    """No memory, full trust."""
    trust = torch.full_like(point.value, max_step)
    return OptimizerState(accepted=point, moved=None, trust=trust)


def lbfgs_step(
    state: OptimizerState, point: Point, max_step: float
) -> tuple[OptimizerState, Structures]:
    """Limited-memory BFGS with a trust radius: next structures to evaluate.

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
    return state, move(point.structures, step)


def worse(new: Point, old: Point) -> Bool[Tensor, " systems"]:
    """Whether value and gradient both rose by more than rounding."""
    n_atoms = old.structures.n_atoms.to(old.value)
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


def fire_step(
    state: OptimizerState, point: Point, max_step: float
) -> tuple[OptimizerState, Structures]:
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
    return state, move(point.structures, step)


Init = Callable[[Point, float], OptimizerState]
Step = Callable[[OptimizerState, Point, float], tuple[OptimizerState, Structures]]
OPTIMIZERS: dict[str, tuple[Init, Step]] = {
    "lbfgs": (lbfgs_init, lbfgs_step),
    "fire": (fire_init, fire_step),
}


def select_state(state: OptimizerState, systems: Int[Tensor, " selected"]) -> OptimizerState:
    """The memory of the given systems alone."""
    rows, index = atoms_of(state.accepted.structures, systems)

    def field(value: Field | None) -> Field | None:
        return None if value is None else value.select(rows, systems, index)

    def per_system(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[systems]

    return OptimizerState(
        accepted=select_point(state.accepted, systems),
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


def select_point(point: Point, systems: Int[Tensor, " selected"]) -> Point:
    """The given systems of a point."""
    rows, index = atoms_of(point.structures, systems)
    return Point(
        structures=select(point.structures, systems),
        value=point.value[systems],
        gradient=point.gradient.select(rows, systems, index),
    )
