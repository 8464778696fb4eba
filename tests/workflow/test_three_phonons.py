"""Matrix elements of three phonons against phono3py, which sums over pairs of atoms."""

import numpy as np
import pytest
from ase.build import bulk

from coset.ase_interface import from_ase
from coset.workflows.conductivity import by_phono3py
from coset.workflows.conductivity.by_phono3py import anharmonic

pytest.importorskip("phono3py")


def crystal(atoms, multiples, seed=0):
    """A crystal with random force constants of all its symmetries."""
    matrix = np.diag(multiples)
    found = anharmonic(from_ase(atoms), matrix, matrix)
    draw = np.random.default_rng(seed)
    count, cells = len(atoms), int(np.prod(multiples))
    shape = (count * cells,) * 2
    second = found.second_symmetrized(
        50.0 * np.eye(3) * np.eye(count * cells)[..., None, None] + draw.normal(size=(*shape, 3, 3))
    )
    third = found.third_symmetrized(draw.normal(size=(count, *shape, 3, 3, 3)))
    found.set_force_constants(second, third)
    return found.phono3py


def both(calculation, mesh):
    """Strengths of interaction at wave vectors over the whole mesh, ours and theirs."""
    calculation.mesh_numbers = mesh
    calculation.init_phph_interaction()
    theirs = calculation.phph_interaction
    theirs.run_phonon_solver()
    points = np.unique(theirs.bz_grid.grg2bzg)
    found = []
    for point in points[:: max(1, len(points) // 8)]:
        theirs.set_grid_point(int(point))
        type(theirs).run(theirs)
        plain = theirs.interaction_strength.copy()
        by_phono3py._take_matrix_products(theirs)
        theirs.run()
        found.append((theirs.interaction_strength.ravel(), plain.ravel()))
    return (np.concatenate(one) for one in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("atoms", "multiples", "mesh"),
    [
        (bulk("Si", "diamond", 5.43), (2, 2, 2), [4, 4, 4]),
        (bulk("CsCl", "cesiumchloride", 4.12), (2, 2, 2), [5, 5, 5]),
        (bulk("ZnO", "wurtzite", 3.25, c=5.2, u=0.38), (2, 2, 1), [3, 3, 2]),
    ],
    ids=["diamond", "cesium chloride", "wurtzite"],
)
def test_strengths_are_those_of_phono3py(atoms, multiples, mesh):
    ours, theirs = both(crystal(atoms, multiples), mesh)
    assert theirs.max() > 0.0
    assert np.abs(ours - theirs).max() < 1e-12 * theirs.max()


def test_triangles_that_do_not_close_take_all_three_means(monkeypatch):
    """A mutant that says that all triangles close is far off."""
    calculation = crystal(bulk("Si", "diamond", 5.43), (2, 2, 2))
    build = by_phono3py.ThreePhonons.build
    monkeypatch.setattr(
        by_phono3py.ThreePhonons, "build",
        lambda third, closed, *rest: build(third, np.ones_like(closed), *rest),
    )  # fmt: skip
    ours, theirs = both(calculation, [3, 3, 3])
    assert np.abs(ours - theirs).max() > 1e-2 * theirs.max()
