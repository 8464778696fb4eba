"""Cutoff functions and the adaptive radius: roots, derivatives, and independence of the atoms."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import tolerances
import torch
from factories import PROTOTYPES
from scipy.optimize import brentq
from scipy.special import expit
from tolerances import close

from coset.pet import cutoff as module
from coset.pet.cutoff import adaptive_radii, bump, bump_slope, cosine
from coset.pet.hypers import CutoffHypers

METHODS = ("converged", "solver10", "grid")
XS = CutoffHypers(cutoff=7.5, n_neighbors=8.0, adaptive_width=0.5, adaptive="converged")
XL = CutoffHypers(cutoff=10.0, n_neighbors=40.0, adaptive_width=1.0, adaptive="converged")
SMALL = CutoffHypers(cutoff=5.0, n_neighbors=8.0, adaptive_width=1.0, adaptive="converged")


def sigmoid_bump(d, radius, width):
    """The bump as the logistic function of 2 cot(pi t), in numpy and without clamps."""
    t = (np.asarray(d) - (radius - width)) / width
    inside = (t > 0) & (t < 1)
    return np.where(inside, expit(2 / np.tan(np.pi * np.where(inside, t, 0.5))), t <= 0)


def excess(radius, d, hypers):
    """n(r) - N for sorted distances."""
    width = hypers.adaptive_width
    first, last = np.searchsorted(d, (radius - width, radius))
    counted = first + sigmoid_bump(d[first:last], radius, width).sum()
    return counted + hypers.n_neighbors * ((radius / hypers.cutoff) ** 3 - 1)


def radii_of(environments, hypers):
    """Radius of one atom per array of distances."""
    centers = np.repeat(np.arange(len(environments)), [len(d) for d in environments])
    flat = torch.tensor(np.concatenate(environments))
    return adaptive_radii(flat, torch.tensor(centers), len(environments), hypers)


@cache
def unit_shells(name, reach):
    """Distances from the first site of a crystal with lattice constant 1, up to `reach`."""
    cell, sites = (np.asarray(part, dtype=float) for part in PROTOTYPES[name])
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    ranges = [np.arange(-n, n + 1) for n in np.ceil(reach / heights).astype(int) + 1]
    grid = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 1, 3)
    found = np.linalg.norm(((grid + sites - sites[0]) @ cell).reshape(-1, 3), axis=1)
    return np.sort(found[(found > 1e-9) & (found <= reach)])


def crystal_shells(name, constants, reach):
    """Sorted distances within `reach` for every lattice constant."""
    unit = unit_shells(name, float(np.ceil(reach / min(constants))))
    return [a * unit[: np.searchsorted(unit, reach / a)] for a in constants]


def random_shells(count, reach, seed=0):
    """0 to 400 neighbors each, uniform in a sphere."""
    rng = np.random.default_rng(seed)
    return [np.sort(reach * rng.uniform(size=n) ** (1 / 3)) for n in rng.integers(0, 401, count)]


def general(seed=1, n_atoms=4, hypers=SMALL):
    """Distances and centers of a few atoms in random environments."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(6, 14, n_atoms)
    d = np.concatenate([rng.uniform(1.5, hypers.cutoff, n) for n in counts])
    return torch.tensor(d), torch.repeat_interleave(torch.tensor(counts)), n_atoms


# Cutoff functions


def test_bump_is_one_then_falls_to_zero():
    d = torch.tensor([0.0, 3.9, 4.0, 4.5, 5.0, 5.1, 20.0], dtype=torch.float64)
    assert bump(d, 5.0, 1.0).tolist() == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    grid = torch.linspace(3.5, 5.5, 401, dtype=torch.float64)
    assert (bump(grid, 5.0, 1.0).diff() <= 0).all()
    np.testing.assert_allclose(
        bump(grid, 5.0, 1.0), sigmoid_bump(grid, 5.0, 1.0), rtol=0, atol=1e-14
    )


def test_cosine_is_one_then_falls_to_zero():
    d = torch.tensor([0.0, 4.0, 4.25, 4.5, 4.75, 5.0, 20.0], dtype=torch.float64)
    quarter = 0.5 + 0.5**1.5
    expected = torch.tensor([1.0, 1.0, quarter, 0.5, 1 - quarter, 0.0, 0.0], dtype=torch.float64)
    assert close(cosine(d, 5.0, 1.0), expected, atol=1e-15)


@pytest.mark.parametrize("function", [bump, cosine])
def test_cutoff_functions_have_their_derivatives(function):
    """To second order, in the distance and in the radius, also where the function is flat."""
    d = torch.tensor([3.2, 4.1, 4.4, 4.6, 4.9, 5.3], dtype=torch.float64, requires_grad=True)
    radius = torch.full_like(d, 5.0, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, r: function(d, r, 1.0), (d, radius))
    assert torch.autograd.gradgradcheck(lambda d, r: function(d, r, 1.0), (d, radius))


def test_slope_of_the_bump_is_its_derivative_in_the_radius():
    d = torch.linspace(3.0, 6.0, 61, dtype=torch.float64)
    radius = torch.full_like(d, 5.0, requires_grad=True)
    (slope,) = torch.autograd.grad(bump(d, radius, 0.7).sum(), radius)
    assert close(bump_slope(d, radius.detach(), 0.7), slope, atol=1e-13)
    assert float(slope.max()) > 1.0


# The root


def assert_roots(environments, hypers):
    found = radii_of(environments, hypers).numpy()
    expected = [
        brentq(excess, 0.0, hypers.cutoff, args=(d, hypers), xtol=1e-13, rtol=1e-14)
        for d in environments
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.RADIUS)


@pytest.mark.parametrize("hypers", [XS, XL], ids=["XS", "XL"])
@pytest.mark.parametrize("name", ["fcc", "bcc", "sc", "diamond"])
def test_converged_is_the_root_in_crystals(name, hypers):
    """500 lattice constants; whole shells enter at once."""
    assert_roots(crystal_shells(name, np.linspace(2.2, 7.0, 500), hypers.cutoff), hypers)


@pytest.mark.parametrize("hypers", [XS, XL], ids=["XS", "XL"])
def test_converged_is_the_root_in_random_environments(hypers):
    """500 environments with 0 to 400 neighbors."""
    assert_roots(random_shells(500, hypers.cutoff), hypers)


@pytest.mark.parametrize("method", METHODS)
def test_the_radius_of_an_isolated_atom(method):
    """R; the probes of `grid` stop at the last one below R, the nearest they can say."""
    radius = float(radii_of([np.zeros(0)], replace(XS, adaptive=method))[0])
    if method == "grid":
        assert XS.cutoff - XS.adaptive_width < radius < XS.cutoff
    else:
        assert radius == XS.cutoff


def test_the_radius_reaches_its_limit_without_a_jump():
    """The last neighbor leaves through R: the radius tends to R, monotonically, within 1e-10 Å."""
    distances = np.linspace(XS.cutoff - XS.adaptive_width, XS.cutoff, 201)
    radii = radii_of([np.array([d]) for d in distances], XS).numpy()
    assert (np.diff(radii) >= 0).all()
    assert radii[0] < XS.cutoff - 0.01
    assert XS.cutoff - radii[-1] < tolerances.RADIUS
    steps = np.diff(distances)
    assert (np.diff(radii) <= 4 * steps).all()


def test_a_neighbor_more_never_widens_the_radius():
    environments = random_shells(100, XL.cutoff, seed=3)
    wider = radii_of(environments, XL)
    narrower = radii_of([np.append(d, 4.0) for d in environments], XL)
    assert (narrower < wider).all()


@pytest.mark.parametrize("width", [0.5, 1.0])
@pytest.mark.parametrize("name", ["fcc", "bcc", "sc", "diamond"])
def test_converged_follows_the_lattice_constant(name, width):
    """|dr| <= 4 da, where entering shells jump in the count of any hard cutoff."""
    assert_smooth(name, width, np.linspace(3.0, 7.0, 401))


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.5, 1.0])
@pytest.mark.parametrize("name", ["fcc", "bcc", "sc", "diamond"])
def test_converged_follows_the_lattice_constant_closely(name, width):
    assert_smooth(name, width, np.arange(2.2, 7.0, 5e-4))


def assert_smooth(name, width, constants):
    hypers = replace(XL, adaptive_width=width)
    radii = radii_of(crystal_shells(name, constants, hypers.cutoff), hypers).numpy()
    assert (np.abs(np.diff(radii)) <= 4 * np.diff(constants)).all()


def test_solver10_jumps_where_converged_does_not():
    """bcc, N = 40, R = 10 Å, w = 1 Å: ten steps end 0.57 Å from the root (known from metatrain)."""
    shells = crystal_shells("bcc", [4.8613, 4.8621], XL.cutoff)
    ten = radii_of(shells, replace(XL, adaptive="solver10")).tolist()
    exact = radii_of(shells, XL).tolist()
    assert ten == pytest.approx([7.5304, 6.9659], abs=1e-4)
    assert exact == pytest.approx([7.5304, 7.5312], abs=1e-4)


def test_solver10_is_the_root_where_it_converges():
    environments = random_shells(200, XL.cutoff, seed=5)
    ten = radii_of(environments, replace(XL, adaptive="solver10")).numpy()
    exact = radii_of(environments, XL).numpy()
    assert np.mean(np.abs(ten - exact) < 1e-6) > 0.95


def numpy_grid(d, hypers):
    """The weighted mean of probes, for one atom."""
    probes = np.arange(0.5, hypers.cutoff, hypers.adaptive_width / 4)
    count = np.array([sigmoid_bump(d, p, hypers.adaptive_width).sum() for p in probes])
    offset = count - hypers.n_neighbors * (1 - np.linspace(0, 1, len(probes)) ** 3)
    logs = -0.5 * (offset / np.maximum(np.abs(np.gradient(offset)), 1e-12)) ** 2
    weights = np.exp(logs - logs.max())
    return (probes * weights).sum() / weights.sum()


@pytest.mark.parametrize("hypers", [XS, XL], ids=["XS", "XL"])
def test_grid_is_the_mean_of_its_probes(hypers):
    environments = random_shells(60, hypers.cutoff, seed=6)
    environments += crystal_shells("diamond", np.linspace(4.0, 6.0, 20), hypers.cutoff)
    found = radii_of(environments, replace(hypers, adaptive="grid")).numpy()
    expected = [numpy_grid(d, hypers) for d in environments]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.RADIUS)


# Derivatives


def radii_function(method, centers, n_atoms, hypers=SMALL):
    own = replace(hypers, adaptive=method)
    return lambda d: adaptive_radii(d, centers, n_atoms, own)


def gradient_of(function, d, weights):
    leaf = d.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf) @ weights, leaf)
    return gradient


def hessian_of(function, d, weights):
    leaf = d.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf) @ weights, leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient]
    return torch.stack(rows)


def central(function, d, step):
    """Differences of a function of the distances in every one of them, first axis."""
    moves = step * torch.eye(len(d), dtype=torch.float64)
    return torch.stack([(function(d + m) - function(d - m)) / (2 * step) for m in moves])


def fourth_order(function, d, step):
    return (4 * central(function, d, step) - central(function, d, 2 * step)) / 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_first_derivatives(method, seed):
    d, centers, n_atoms = general(seed)
    function, weights = radii_function(method, centers, n_atoms), torch.ones(n_atoms).double()
    exact = gradient_of(function, d, weights)
    numerical = fourth_order(lambda x: function(x) @ weights, d, 1e-4)
    scale = float(exact.abs().max())
    assert scale > 0.05
    assert float((exact - numerical).abs().max()) < 1e-6 * scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_second_derivatives(method, seed):
    """One implicit step would miss three of the four terms of the second derivative."""
    d, centers, n_atoms = general(seed, n_atoms=2)
    function, weights = radii_function(method, centers, n_atoms), torch.tensor([1.0, -0.5]).double()
    exact = hessian_of(function, d, weights)
    numerical = fourth_order(lambda x: gradient_of(function, x, weights), d, 1e-4)
    scale = float(exact.abs().max())
    assert scale > 0.05
    assert float((exact - exact.mT).abs().max()) < 1e-12 * scale
    assert float((exact - numerical).abs().max()) < 1e-5 * scale


def test_derivatives_at_the_limit():
    """At r = R the slope of the count is 3 N/R, and a leaving neighbor has no derivative."""
    d = torch.tensor([XS.cutoff - 1e-9], dtype=torch.float64)
    function = radii_function("converged", torch.zeros(1, dtype=torch.int64), 1, XS)
    ones = torch.ones(1, dtype=torch.float64)
    assert float(gradient_of(function, d, ones).abs()) < 1e-12
    assert float(hessian_of(function, d, ones).abs()) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    d, centers, n_atoms = general(4, n_atoms=2)
    d.requires_grad_()
    function = radii_function(method, centers, n_atoms)
    assert torch.autograd.gradcheck(function, d)
    assert torch.autograd.gradgradcheck(function, d)


@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_the_second_backward_pass(method):
    """All Hessian columns at once, as lattice dynamics asks for them, are those one by one."""
    d, centers, n_atoms = general(2)
    function, weights = radii_function(method, centers, n_atoms), torch.ones(n_atoms).double()
    leaf = d.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf) @ weights, leaf, create_graph=True)

    def column(seed):
        return torch.autograd.grad(gradient, leaf, seed, retain_graph=True)[0]

    columns = torch.func.vmap(column)(torch.eye(len(d), dtype=torch.float64))
    one_by_one = hessian_of(function, d, weights)
    assert close(columns, one_by_one, atol=1e-13)
    assert float(one_by_one.abs().max()) > 0.05


# Batches


@pytest.mark.parametrize("chunk", [1, 2000])
def test_grid_in_chunks_is_grid_at_once(chunk, monkeypatch):
    """Values, gradients and Hessian-vector products."""
    d, centers, n_atoms = general(7, n_atoms=12)
    rng = np.random.default_rng(0)
    weights, direction = (
        torch.tensor(rng.normal(size=n_atoms)),
        torch.tensor(rng.normal(size=len(d))),
    )

    def everything():
        leaf = d.clone().requires_grad_()
        radii = radii_function("grid", centers, n_atoms)(leaf)
        (gradient,) = torch.autograd.grad(radii @ weights, leaf, create_graph=True)
        return radii, gradient, torch.autograd.grad(gradient @ direction, leaf)[0]

    whole = everything()
    monkeypatch.setattr(module, "GRID_CHUNK", chunk)
    chunks = module._atom_chunks(centers, n_atoms, replace(SMALL, adaptive="grid"))
    assert 1 < len(chunks) <= n_atoms
    assert [first for first, _, _ in chunks] == [0, *[last for _, last, _ in chunks[:-1]]]
    for at_once, in_parts in zip(whole, everything(), strict=True):
        assert close(at_once, in_parts, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_neighbor_in_the_batch_changes_nothing(method):
    """One atom with 15 N neighbors within 0.5 Å: its count is far off at every probe, and weights
    relative to the largest of the whole batch would underflow to 0/0."""
    hypers = replace(XS, adaptive=method)
    normal, poison = random_shells(20, XS.cutoff, seed=8), np.full(120, 0.02)
    alone, own = radii_of(normal, hypers), radii_of([poison], hypers)
    together = radii_of([*normal[:10], poison, *normal[10:]], hypers)
    assert together.isfinite().all()
    rest = torch.cat([together[:10], together[11:]])
    assert close(rest, alone, tolerances.SAME_ALGEBRA)
    assert close(together[10:11], own, tolerances.SAME_ALGEBRA)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_stay_within_an_atom(method):
    d, centers, n_atoms = general(1)
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    gradient = gradient_of(radii_function(method, centers, n_atoms), d, weights)
    assert not gradient[centers != 1].any()
    assert gradient[centers == 1].any()


@pytest.mark.parametrize("method", METHODS)
def test_radii_are_float64_for_float32_distances(method):
    d, centers, n_atoms = general(1)
    single = radii_function(method, centers, n_atoms)(d.float())
    double = radii_function(method, centers, n_atoms)(d.float().double())
    assert single.dtype == torch.float64
    assert torch.equal(single, double)


def test_shells_are_those_of_the_crystals():
    """`unit_shells`: 12, 6, 24 neighbors in fcc; 4, 12, 12 in diamond; 8, 6, 12 in bcc."""
    for name, counts in {"fcc": (12, 6, 24), "diamond": (4, 12, 12), "bcc": (8, 6, 12)}.items():
        shells = unit_shells(name, 3.0)
        jumps = np.flatnonzero(np.diff(shells) > 1e-9) + 1
        assert tuple(b - a for a, b in pairwise([0, *jumps[:3]])) == counts
