"""Averages of a potential over rotations: a rule for every system, results in the input frame.

    E = sum_k w_k E(R_k x)     F = sum_k w_k F(R_k x) R_k     S = sum_k w_k R_k^T S(R_k x) R_k

A model rotates edge vectors: one neighbor list, one geometry, one gradient for all nodes. Any other
potential is asked about rotated copies, which is also what the fast way is tested against.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from coset.edge_model import IDENTITY, Quadrature
from coset.errors import StructureError
from coset.potential import ModelPotential, Potential
from coset.structures import (
    PER_ATOM_PROPERTIES,
    Properties,
    Structures,
    atoms_of,
    deform,
    join_properties,
    select,
)
from coset.symmetry.crystal import CrystalSymmetry
from coset.symmetry.primitive import orientation
from coset.symmetry.rules import haar_offsets, level_rule

ENERGIES = ("energy", "atomic_energies")
MATRICES = ("stress", "direct_stress")


def averaged_properties(
    potential: Potential, structures: Structures, rules: Sequence[Quadrature]
) -> Properties:
    """Properties of every system averaged over its own rule.

    Systems with equally many nodes share a batch.

    Raises:
        StructureError: for a system that the potential cannot take, by its place in `structures`.
    """
    sizes = [len(rule.weights) for rule in rules]
    groups = [[k for k, n in enumerate(sizes) if n == size] for size in sorted(set(sizes))]
    parts = []
    for group in groups:
        systems = torch.tensor(group, device=structures.cell.device)
        batch = structures if len(groups) == 1 else select(structures, systems)
        try:
            parts.append(_average(potential, batch, stacked([rules[k] for k in group])))
        except StructureError as error:
            raise _renumbered(error, group) from None
    if len(groups) == 1:
        return parts[0]
    order = torch.tensor([k for group in groups for k in group], device=structures.cell.device)
    return _reordered(join_properties(parts), structures, order)


def has_direct_heads(potential: Potential) -> bool:
    """Whether the potential is a model asked for direct forces, which need a higher degree."""
    return isinstance(potential, ModelPotential) and potential.outputs.direct_forces is not None


def stacked(rules: Sequence[Quadrature]) -> Quadrature:
    """Rules of several systems, equally long, as one: rotations [nodes, systems, 3, 3]."""
    return Quadrature(
        rotations=torch.stack([rule.rotations for rule in rules], dim=1),
        weights=torch.stack([rule.weights for rule in rules], dim=1),
        degree=min(rule.degree for rule in rules),
    )


def merged(rules: Sequence[Quadrature]) -> Quadrature:
    """The mean of several rules as one."""
    return Quadrature(
        rotations=torch.cat([rule.rotations for rule in rules]),
        weights=torch.cat([rule.weights / len(rules) for rule in rules]),
        degree=min(rule.degree for rule in rules),
    )


def translated(rule: Quadrature, rotation: Float[Tensor, "3 3"]) -> Quadrature:
    """The rule with nodes V R_k, of the same degree: one more sample of what the rule leaves."""
    return replace(rule, rotations=rotation.to(rule.rotations) @ rule.rotations)


def sample_rules(
    one: Structures, group: CrystalSymmetry, level: str, count: int, seed: int = 0
) -> tuple[Quadrature, ...]:
    """The rule of a level turned at random `count` times; single frames where it has no degree.

    What differs from one to the next is what the level leaves; they turn with the crystal. For
    `none` the frame as it is.
    """
    if level == "none":
        return (IDENTITY,)
    turn, operations = orientation(one, group), torch.from_numpy(group.cartesian_rotations)
    (rule, *_) = level_rule(operations, level, turn=turn)
    if rule.degree == 0:
        rule = replace(rule, rotations=turn[None])
    return tuple(translated(rule, offset) for offset in haar_offsets(count, seed))


def mean_and_error(samples: Sequence[Properties]) -> tuple[Properties, Properties | None]:
    """Mean of independent samples and its standard error sd/sqrt(m); None for a single one."""
    count = len(samples)
    if count == 1:
        return samples[0], None
    means, errors = {}, {}
    for field in fields(Properties):
        values = [getattr(sample, field.name) for sample in samples]
        if values[0] is None:
            continue
        stacked_values = torch.stack(values)
        means[field.name] = stacked_values.mean(0)
        errors[field.name] = stacked_values.std(0) / count**0.5
    return Properties(**means), Properties(**errors)


def _average(potential: Potential, structures: Structures, rule: Quadrature) -> Properties:
    if isinstance(potential, ModelPotential):
        return replace(potential, quadrature=rule)(structures)
    return average_of_copies(potential, structures, rule)


def _renumbered(error: StructureError, group: Sequence[int]) -> StructureError:
    """The error of a system of a group with its place in the whole batch."""
    if not error.structure_id.isdecimal():
        return error
    return StructureError(
        error.reason,
        code=error.code,
        structure_id=str(group[int(error.structure_id)]),
        field=error.field,
    )


def average_of_copies(potential: Potential, structures: Structures, rule: Quadrature) -> Properties:
    """The average by its definition, from rotated copies of the structures; for any potential."""
    rotations, weights = rule.per_system(len(structures), structures.cell)
    total: dict[str, Tensor] = {}
    for rotation, weight in zip(rotations, weights, strict=True):
        found = potential(deform(structures, rotation.mT))
        for name, value in _turned_back(found, structures, rotation).items():
            own = weight[structures.system_index] if name in PER_ATOM_PROPERTIES else weight
            term = value * own.reshape(-1, *[1] * (value.ndim - 1))
            total[name] = total[name] + term if name in total else term
    return Properties(**total)


def _turned_back(
    properties: Properties, structures: Structures, rotation: Float[Tensor, "systems 3 3"]
) -> dict[str, Tensor]:
    """Properties of structures turned by R in the frame before: vectors v R, matrices R^T m R."""
    per_atom = rotation[structures.system_index]
    values = {}
    for field in fields(Properties):
        value: Tensor | None = getattr(properties, field.name)
        if value is None:
            continue
        value = value.double()
        if field.name in MATRICES:
            value = rotation.mT @ value @ rotation
        elif field.name == "torque":  # an axial vector
            axial = torch.linalg.det(rotation)[:, None, None] * rotation
            value = torch.einsum("sa,sab->sb", value, axial)
        elif field.name not in ENERGIES:
            value = torch.einsum("ia,iab->ib", value, per_atom)
        values[field.name] = value
    return values


def _reordered(properties: Properties, structures: Structures, order: Tensor) -> Properties:
    """Properties of the systems `order` of `structures` in the order of `structures`."""
    back = torch.argsort(order)
    atoms = torch.argsort(atoms_of(structures, order)[0])
    values = {field.name: getattr(properties, field.name) for field in fields(Properties)}
    return Properties(
        **{
            name: None if v is None else v[atoms if name in PER_ATOM_PROPERTIES else back]
            for name, v in values.items()
        }
    )
