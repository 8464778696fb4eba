"""What every test starts from: one thread, tiny random PET potentials, ten fixed structures."""

import numpy as np
import pytest
import torch
from factories import FCC, HYPERS, TRICLINIC, crystal, molecule, tiny_potential
from lennard_jones import LennardJones

pytest.register_assert_rewrite("bad_input_checks")
torch.set_num_threads(1)

ALL_ELEMENTS = tuple(range(1, 119))
METHODS = ("converged", "fixed", "grid", "solver10")
_U = 0.3053


def ten_structures():
    """Crystals (Wyckoff, Crystal Structures), a slab, a molecule, a chain, odd cells; Å."""
    a, c = 4.594, 2.959
    oxygen = ((_U, _U, 0), (-_U, -_U, 0), (0.5 + _U, 0.5 - _U, 0.5), (0.5 - _U, 0.5 + _U, 0.5))
    hexagonal = np.array([(3.209, 0, 0), (-1.6045, 3.209 * 0.75**0.5, 0), (0, 0, 5.211)])
    left_handed = np.array(TRICLINIC)[[1, 0, 2]]
    skewed = left_handed + np.outer((0, 2, -2), left_handed[0])
    return {
        "Al": crystal(4.05 * np.eye(3), ((0, 0, 0), *np.array(FCC)), [13] * 4),
        "Si": crystal(5.431 * np.array(FCC), ((0, 0, 0), (0.25, 0.25, 0.25)), [14] * 2),
        "TiO2": crystal(
            np.diag([a, a, c]), ((0, 0, 0), (0.5, 0.5, 0.5), *oxygen), [22, 22, 8, 8, 8, 8]
        ),
        "NaCl": crystal(5.640 * np.array(FCC), ((0, 0, 0), (0.5, 0.5, 0.5)), [11, 17]),
        "Mg": crystal(hexagonal, ((1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)), [12, 12]),
        "slab": crystal(
            np.diag([2.86, 2.86, 15.0]),
            ((0, 0, 0), (0.5, 0.5, 2.02 / 15), (0, 0, 4.05 / 15)),
            [13, 13, 13],
            pbc=(True, True, False),
        ),
        "water": molecule(((0, 0, 0.119), (0, 0.763, -0.477), (0, -0.763, -0.477)), [8, 1, 1]),
        "chain": crystal(
            np.diag([10.0, 10.0, 2.5]), ((0, 0, 0), (0.1, 0, 0.5)), [6, 6], pbc=(False, False, True)
        ),
        "left-handed": crystal(
            skewed, ((0.02, 0.03, 0), (0.5, 0.4, 0.1), (0.4, 0.1, 0.6)), [29, 8, 14]
        ),
        "one atom": crystal(2.4 * np.eye(3), ((0.1, 0.2, 0.3),), [26]),
    }


def pet_of_all_elements(method="converged"):
    """A tiny random PET that knows every element, with an energy head only."""
    return tiny_potential(method, atomic_types=ALL_ELEMENTS, targets=HYPERS.targets[:1])


@pytest.fixture(scope="session")
def pet():
    """A tiny random PET for all elements, with converged adaptive cutoffs."""
    return pet_of_all_elements()


@pytest.fixture(scope="session", params=METHODS)
def any_pet(request):
    """The same network with each way to choose cutoffs."""
    return pet_of_all_elements(request.param)


@pytest.fixture(scope="session")
def few_elements_pet():
    """A tiny random PET for H, C, O, Si and Cu, with direct heads."""
    return tiny_potential()


@pytest.fixture(scope="session")
def lennard_jones():
    """An analytic potential."""
    return LennardJones()


@pytest.fixture(scope="session")
def fixed_structures():
    """Ten structures by name."""
    return ten_structures()
