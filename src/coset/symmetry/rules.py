"""Rotation quadratures that know the point group of a structure: point groups, rules, levels.

A potential without rotational symmetry is a function f(R) = E(R x) on O(3),

    f(R) = sum_lp tr[C_lp D^lp(R)],   p = +-1,   D^lp(-R) = p D^l(R),

of which (l, p) = (0, +) is the invariant energy and the rest is error. An operation g of the
structure maps it onto itself, so f(R g) = f(R). With the projector P_G^lp = mean_g D^lp(g) a rule
{R_k, w_k} has degree t for the group G if

    sum_k w_k D^lp(R_k) P_G^lp = 0   for 1 <= l <= t and both p.

Four facts, on which this file stands:

* Only the rotations G+ in G matter. On proper nodes D^l- = D^l+, and P_G = P_G+ P_G, so that a rule
  of proper nodes for G+ is one for G. No inversion doubling: with an improper operation in G the
  sector (0, -) has no invariant, in a chiral group it alone survives.
* Axes: a rule for S serves G = U S U^T with nodes R_k U^T. So does V R_k U^T for any rotation V.
* A rule for M serves its subgroups: if M = c_1 S + ... + c_m S, then P_M = mean_j D(c_j) P_S, and
  the nodes R_k c_j have the degree for S that R_k have for M. Sixteen stored rules give the
  smallest known sets for all groups, and many come from the icosahedral group.
* Nodes may be whole orbits H R_k of a left group H, which makes them few to store.

recipes/rules/find_rules.py finds the rules and checks them.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coset.edge_model import IDENTITY, Quadrature
from coset.errors import StructureError, check_choice, check_range

MAX_DEGREE = 9
TOLERANCE = 1e-5  # operations of finite groups differ by 0.5 or more, symmetrized ones are exact


@dataclass(frozen=True, kw_only=True, slots=True)
class PointGroup:
    """Symbols of a point group and its frame U: the rule axes as columns in lab coordinates.

    With S = `rotation_group(schoenflies)` the operations are U S U^T, as sets.
    """

    schoenflies: str
    hermann_mauguin: str
    frame: Float[Tensor, "3 3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """How much one evaluation averages over rotations.

    degree: of the rule, 0 for none. degree_without_rotations: the same if the identity is the only
    rotation (classes 1, -1 and m, molecules without symmetry), where nodes are dearest. offsets:
    random left translates of the rule. projects: whether forces and stress are then projected.
    """

    degree: int = 0
    degree_without_rotations: int = 0
    offsets: int = 0
    projects: bool = True


LEVELS = {
    "none": Level(projects=False),
    "project": Level(),
    "light": Level(degree=3, degree_without_rotations=3),
    "standard": Level(degree=5, degree_without_rotations=3),
    "tight": Level(degree=7, degree_without_rotations=5),
    "reference": Level(degree=9, degree_without_rotations=7, offsets=3),
}

_GOLDEN_RATIO = (1 + 5**0.5) / 2
_AXES = {
    "x": (1.0, 0.0, 0.0),
    "z": (0.0, 0.0, 1.0),
    "d": (1.0, 1.0, 1.0),
    "v": (0.0, 1.0, _GOLDEN_RATIO),
}
# Schoenflies and Hermann-Mauguin symbol; generators, each a fold, negative with an inversion, and
# its axis. The main axis is z (also of 2, m and 2/m). Along x lies a two-fold axis, or the normal
# of a mirror in mm2, 3m, 4mm, 5m, 6mm. Crystals, then the icosahedral groups and those with one
# five-fold axis. The larger of two groups comes later.
_POINT_GROUPS = {
    "C1": ("1", ""),
    "Ci": ("-1", "-1z"),
    "C2": ("2", "2z"),
    "Cs": ("m", "-2z"),
    "C3": ("3", "3z"),
    "C2h": ("2/m", "2z -1z"),
    "D2": ("222", "2z 2x"),
    "C2v": ("mm2", "2z -2x"),
    "C4": ("4", "4z"),
    "S4": ("-4", "-4z"),
    "C5": ("5", "5z"),
    "C3i": ("-3", "-3z"),
    "D3": ("32", "3z 2x"),
    "C3v": ("3m", "3z -2x"),
    "C6": ("6", "6z"),
    "C3h": ("-6", "-6z"),
    "D2h": ("mmm", "2z 2x -1z"),
    "C4h": ("4/m", "4z -1z"),
    "D4": ("422", "4z 2x"),
    "C4v": ("4mm", "4z -2x"),
    "D2d": ("-42m", "-4z 2x"),
    "C5i": ("-5", "-5z"),
    "C5h": ("-10", "5z -2z"),
    "D5": ("52", "5z 2x"),
    "C5v": ("5m", "5z -2x"),
    "D3d": ("-3m", "-3z 2x"),
    "C6h": ("6/m", "6z -1z"),
    "D6": ("622", "6z 2x"),
    "C6v": ("6mm", "6z -2x"),
    "D3h": ("-6m2", "-6z 2x"),
    "T": ("23", "2z 3d"),
    "D4h": ("4/mmm", "4z 2x -1z"),
    "D5d": ("-5m", "-5z 2x"),
    "D5h": ("-10m2", "5z -2z 2x"),
    "D6h": ("6/mmm", "6z 2x -1z"),
    "Th": ("m-3", "2z -3d"),
    "O": ("432", "4z 3d"),
    "Td": ("-43m", "-4z 3d"),
    "Oh": ("m-3m", "4z -3d"),
    "I": ("235", "2z 3d 5v"),
    "Ih": ("m-3-5", "2z -3d 5v"),
}
_ROTATION_GROUPS = tuple(name for name, (_, text) in _POINT_GROUPS.items() if "-" not in text)
# Of several frames that fit, the one closest to the axes; skewed, so that none are equally so.
_PREFERRED = ((1.0, 0.013, -0.029), (0.017, 1.1, 0.007), (0.023, -0.011, 1.2))


def coset_rule(
    operations: Float[Tensor, "operations 3 3"],
    degree: int,
    *,
    offset: Float[Tensor, "3 3"] | None = None,
    turn: Float[Tensor, "3 3"] | None = None,
) -> Quadrature:
    """The fewest nodes known that have at least this degree for a point group; float64, proper.

        rotations_k = V R_k U^T,   sum_k w_k D^l(rotations_k) P_G^l = 0,   1 <= l <= degree

    operations: Cartesian, orthogonal, of a crystal or molecule in any orientation, all rotations
    and maybe improper ones; translations do not matter. Equal sets give equal nodes. degree: 1-9,
    next of 3, 5, 7, 9. offset: V, a rotation. turn: a rotation to axes fixed in the crystal, which
    choose among frames U that fit, as those of the lab do without. Energies, forces, stress and
    Hessians projected on the group have the degree; direct forces need one more, stress two.

    Raises:
        ConfigError: degree outside 1-9.
        StructureError: "NoPointGroup", if the operations are no group to 1e-5.
    """
    check_range("degree", degree, 1, MAX_DEGREE)
    axes = torch.eye(3, dtype=torch.float64) if turn is None else turn.cpu().double()
    group = axes @ _checked(operations) @ axes.T
    symbol, frame = _largest(group[torch.linalg.det(group) > 0], _ROTATION_GROUPS)
    rule = _smallest_rule(symbol, degree)
    rotations = rule.rotations @ frame.T @ axes
    if offset is not None:
        rotations = offset.to(rotations) @ rotations
    return Quadrature(
        rotations=rotations.to(operations.device),
        weights=rule.weights.to(operations.device, copy=True),  # the rule is kept and used again
        degree=rule.degree,
    )


def level_rule(
    operations: Float[Tensor, "operations 3 3"],
    level: str,
    *,
    seed: int = 0,
    direct: bool = False,
    turn: Float[Tensor, "3 3"] | None = None,
) -> tuple[Quadrature, ...]:
    """The quadrature of a level; several random translates of it if the level has offsets.

    The mean over the translates is the result, their standard error the rotational error of it.
    direct: two degrees more for direct heads, 9 being the most. turn: as for `coset_rule`.

    Raises:
        ConfigError: unknown level.
        StructureError: as `coset_rule`.
    """
    check_choice("level", level, tuple(LEVELS))
    chosen = LEVELS[level]
    if chosen.degree == 0:
        return (IDENTITY,)
    turned = operations.diagonal(dim1=1, dim2=2).sum(1) < 3 - TOLERANCE
    has_rotations = bool((turned & (torch.linalg.det(operations) > 0)).any())
    degree = chosen.degree if has_rotations else chosen.degree_without_rotations
    degree = min(degree + 2, MAX_DEGREE) if direct else degree
    offsets = haar_offsets(chosen.offsets, seed) if chosen.offsets else (None,)
    return tuple(coset_rule(operations, degree, offset=offset, turn=turn) for offset in offsets)


def haar_offsets(count: int, seed: int) -> Float[Tensor, "count 3 3"]:
    """Uniformly distributed rotations, float64: normalized quaternions of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    quaternions = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return _matrices(quaternions / quaternions.norm(dim=1, keepdim=True))


def identify(operations: Float[Tensor, "operations 3 3"]) -> PointGroup:
    """The point group of Cartesian operations in any orientation.

    All crystallographic and icosahedral groups and those with one five-fold axis are known. Of
    another group (a molecule's) it is the largest known subgroup.

    Raises:
        StructureError: as `coset_rule`.
    """
    symbol, frame = _largest(_checked(operations), tuple(_POINT_GROUPS))
    return PointGroup(
        schoenflies=symbol,
        hermann_mauguin=_POINT_GROUPS[symbol][0],
        frame=frame.to(operations.device),
    )


@cache
def rotation_group(symbol: str) -> Float[Tensor, "operations 3 3"]:
    """Operations of a point group (Schoenflies symbol) in rule axes; float64, identity first."""
    generators = _generators(symbol)
    group = generators[:1]
    while True:
        products = (group[:, None] @ generators).reshape(-1, 3, 3)
        grown = _distinct(torch.cat([group, products]))
        if len(grown) == len(group):
            return group
        group = grown


class _Stored(NamedTuple):
    """A rule of the file: quaternions x, y, z, w and weights of nodes before `left` acts."""

    group: str
    degree: int
    left: str
    quaternions: Float[Tensor, "base 4"]
    weights: Float[Tensor, " base"]


@cache
def _smallest_rule(symbol: str, degree: int) -> Quadrature:
    """The fewest nodes of at least this degree for a rotation group, in its rule axes."""
    order = len(rotation_group(symbol))
    fitting: list[tuple[int, int, _Stored, Tensor]] = []
    for stored in _stored_rules():
        group = rotation_group(stored.group)
        frame = _frame(symbol, group, _possible_frames(group))
        if frame is not None and stored.degree >= degree:
            n_nodes = len(rotation_group(stored.left)) * len(stored.weights) * len(group) // order
            fitting.append((n_nodes, -stored.degree, stored, frame))
    _, _, best, frame = min(fitting, key=lambda one: one[:2])
    return _expanded(best, symbol, frame)


def _stored_rules() -> list[_Stored]:
    text = resources.files("coset.symmetry").joinpath("rules.json").read_text("utf-8")
    result = []
    for row in json.loads(text):
        nodes = torch.tensor(row["nodes"], dtype=torch.float64)
        result.append(_Stored(row["group"], row["degree"], row["left"], nodes[:, :4], nodes[:, 4]))
    return result


def _expanded(stored: _Stored, symbol: str, frame: Float[Tensor, "3 3"]) -> Quadrature:
    """Nodes h R_k c_j U for a subgroup U S U^T of the rule's group, M = c_1 U S U^T + ..."""
    group, left = rotation_group(stored.group), rotation_group(stored.left)
    subgroup = frame @ rotation_group(symbol) @ frame.T
    members = _same(group[:, None] @ subgroup, group).any(dim=1)
    representatives = group[~members.tril(-1).any(dim=1)] @ frame
    base = _matrices(stored.quaternions)
    nodes = left[:, None, None] @ base[:, None] @ representatives
    weights = stored.weights[:, None] / (len(left) * len(representatives))
    return Quadrature(
        rotations=nodes.reshape(-1, 3, 3),
        weights=weights.expand(nodes.shape[:3]).flatten(),
        degree=stored.degree,
    )


def _checked(operations: Float[Tensor, "operations 3 3"]) -> Float[Tensor, "distinct 3 3"]:
    """The distinct operations on the CPU in float64; they must be a group."""
    given = operations.detach().to("cpu", torch.float64)
    lengths = given @ given.mT - torch.eye(3, dtype=torch.float64)
    if len(given) and float(lengths.abs().max()) < TOLERANCE:
        group = _distinct(given)
        if bool(_same(group[:, None] @ group, group).any(dim=-1).all()):
            return group
    raise StructureError(
        f"{len(given)} operations are no group of orthogonal matrices to {TOLERANCE}",
        code="NoPointGroup",
        hint="give all of them, of the symmetrized structure",
    )


def _largest(
    group: Float[Tensor, "operations 3 3"], symbols: tuple[str, ...]
) -> tuple[str, Float[Tensor, "3 3"]]:
    """The last of the symbols whose operations are within the group, and its frame."""
    frames = _possible_frames(group)
    for symbol in reversed(symbols):
        divides = len(group) % len(rotation_group(symbol)) == 0
        frame = _frame(symbol, group, frames) if divides else None
        if frame is not None:
            return symbol, frame
    raise ValueError(f"{symbols} lack the identity")


def _frame(
    symbol: str, group: Float[Tensor, "operations 3 3"], frames: Float[Tensor, "frames 3 3"]
) -> Float[Tensor, "3 3"] | None:
    """The preferred one of the frames U with U S U^T within the group, None if there is none.

    Found from the operations, because the rotation to a standard setting does not lead to the rule
    axes in 28 space groups: 3-15, 115-120, 149, 151, 153, 157, 159, 162, 163, 187, 188.
    """
    turned = frames[:, None] @ _generators(symbol) @ frames.mT[:, None]
    fits: Bool[Tensor, " frames"] = _same(turned, group).any(dim=-1).all(dim=-1)
    if not bool(fits.any()):
        return None
    closeness = (frames * frames.new_tensor(_PREFERRED)).sum(dim=(1, 2))
    return frames[closeness.where(fits, -math.inf).argmax()]


def _possible_frames(group: Float[Tensor, "operations 3 3"]) -> Float[Tensor, "frames 3 3"]:
    """Frames (x, y, z) of all perpendicular pairs of axes; any x for a z without one."""
    axes = _axes_of(group)
    if not len(axes):
        return torch.eye(3, dtype=torch.float64)[None]
    z = torch.cat([axes, -axes])
    perpendicular = (z @ z.T).abs() < TOLERANCE
    first, second = perpendicular.nonzero().unbind(dim=1)
    lonely = z[~perpendicular.any(dim=1)]
    # the x that makes the frame preferred: x . m_x + (z x x) . m_y is largest
    preferred = z.new_tensor(_PREFERRED)
    free = preferred[:, 0] + torch.linalg.cross(preferred[:, 1].expand_as(lonely), lonely)
    z, x = torch.cat([z[first], lonely]), torch.cat([z[second], free])
    x = x - (x * z).sum(dim=1, keepdim=True) * z
    x = x / x.norm(dim=1, keepdim=True)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=2)


def _axes_of(group: Float[Tensor, "operations 3 3"]) -> Float[Tensor, "axes 3"]:
    """Unit vectors along the rotation axes, one each, from R + R^T + (1 - tr R) 1 ~ n n^T."""
    rotations = group * torch.linalg.det(group)[:, None, None]
    trace = rotations.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    outer = rotations + rotations.mT + (1 - trace) * torch.eye(3, dtype=torch.float64)
    outer = outer[trace.flatten() < 3 - TOLERANCE]
    longest = outer.norm(dim=1).argmax(dim=1)
    axes: Tensor = outer[torch.arange(len(outer)), longest]
    axes = axes / axes.norm(dim=1, keepdim=True)
    repeated = ((axes @ axes.T).abs() > 1 - TOLERANCE**2).tril(-1).any(dim=1)
    return axes[~repeated]


@cache
def _generators(symbol: str) -> Float[Tensor, "generators 3 3"]:
    """The identity and the generators of a point group in rule axes."""
    operations = [torch.eye(3, dtype=torch.float64)]
    for text in _POINT_GROUPS[symbol][1].split():
        fold, axis = int(text[:-1]), torch.tensor(_AXES[text[-1]], dtype=torch.float64)
        half_angle = math.pi / abs(fold)
        vector = math.sin(half_angle) * axis / axis.norm()
        rotation = _matrices(torch.cat([vector, vector.new_tensor([math.cos(half_angle)])]))
        operations.append(math.copysign(1, fold) * rotation)
    return torch.stack(operations)


def _matrices(quaternions: Float[Tensor, "*nodes 4"]) -> Float[Tensor, "*nodes 3 3"]:
    """Rotation matrices of unit quaternions x, y, z, w."""
    x, y, z, w = quaternions.unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def _same(
    operations: Float[Tensor, "*these 3 3"], group: Float[Tensor, "others 3 3"]
) -> Bool[Tensor, "*these others"]:
    """Which are equal: |A - B|^2 = 6 - 2 tr A^T B of orthogonal matrices."""
    equal: Tensor = operations.flatten(-2) @ group.flatten(-2).T > 3 - TOLERANCE**2 / 2
    return equal


def _distinct(operations: Float[Tensor, "operations 3 3"]) -> Float[Tensor, "distinct 3 3"]:
    return operations[~_same(operations, operations).tril(-1).any(dim=1)]
