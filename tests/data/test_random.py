import numpy as np
import pytest

from coset.data.random import hashed, orthogonal, permuted, uniform


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutations_hit_every_place_once(size):
    order = permuted(7, "order", size, np.arange(size))
    assert sorted(order) == list(range(size))


def test_permutations_are_pure_and_differ():
    places = np.arange(1000)
    order = permuted(7, "order", 1000, places)
    part = permuted(7, "order", 1000, places[300:310])
    assert (order[300:310] == part).all()
    assert (order != permuted(8, "order", 1000, places)).mean() > 0.99
    assert (order != permuted(7, "other", 1000, places)).mean() > 0.99
    assert abs(np.corrcoef(order, places)[0, 1]) < 0.1


def test_uniform_numbers_fill_the_interval_evenly():
    u = uniform(1, "u", np.arange(200_000), 2)
    assert ((u >= 0) & (u < 1)).all()
    counts = np.histogram2d(u[:, 0], u[:, 1], bins=10, range=[[0, 1], [0, 1]])[0]
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_every_bit_of_the_hash_depends_on_every_bit_of_the_number():
    numbers = np.arange(4000, dtype=np.uint64)
    for bit in range(0, 64, 7):
        changed = hashed(1, "h", numbers) ^ hashed(1, "h", numbers ^ np.uint64(1 << bit))
        flips = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(flips - 0.5) < 0.01


def test_random_matrices_are_haar_distributed_in_o3():
    R = orthogonal(1, "r", np.arange(40_000))
    assert abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max() < 1e-14
    determinants = np.linalg.det(R)
    assert abs(abs(determinants) - 1.0).max() < 1e-14
    assert abs(determinants.mean()) < 0.02
    assert abs(R.mean(0)).max() < 0.02
    assert abs((R**2).mean(0) - 1 / 3).max() < 0.01
    # Fourth moments of the Haar measure: <R_ab^4> = 1/5 and <R_ab^2 R_cd^2> = 2/15, a != c, b != d.
    assert abs((R**4).mean(0) - 0.2).max() < 0.01
    assert abs((R[:, 0, 0] ** 2 * R[:, 1, 1] ** 2).mean() - 2 / 15) < 0.01
