"""Tolerances of the physics tests, absolute, each with its reason (eV, Å; float64 unless said)."""

import torch

PARITY_ENERGY = 1e-9
"""eV/atom, against numbers of another implementation: sums in another order give 1e-14."""

PARITY_FORCE = 1e-8
"""eV/Å."""

PARITY_STRESS = 1e-9
"""eV/Å³."""

PARITY_SINGLE = 2e-6
"""float32 weights: 16 machine epsilons, relative to the largest component or to 1 if larger."""

PARITY_SINGLE_ZBL = 1e-5
"""float32 positions too: 1e-7 Å times the 100 eV/Å² of a repulsion."""

PARITY_COMPILED_ZBL = 1e-6
"""Relative as above: float32 constants of the repulsion, 6e-8 of a few eV, in another order."""

FORCE_DIFFERENCE = 1e-7
"""eV/Å, central differences at the best step: 1e-14 eV of rounding over 1e-5 Å, plus h² terms."""

STRESS_DIFFERENCE = 1e-8
"""eV/Å³, the same divided by a volume."""

HESSIAN_DIFFERENCE = 1e-8
"""eV/Å², differences of forces of fourth order over 1e-4 Å: 1e-13 eV/Å of rounding, and h⁴."""

FOLDED_HESSIAN = 1e-9
"""eV/Å², D(q) of one cell against the Hessian of a supercell: the same sums in another order."""

AVERAGED = 1e-12
"""eV, eV/Å, eV/Å³: averages over rotated edge vectors and over rotated structures."""

TORQUE_DIFFERENCE = 1e-8
"""eV, central differences in an angle at the best step."""

SAME_PHYSICS = 1e-10
"""eV and eV/Å, one structure described in two ways (translated, repeated, other cell): rounding of
coordinates of 100 Å (1e-14) times force constants of 100 eV/Å², with a margin."""

SAME_ALGEBRA = 1e-12
"""eV, eV/Å, eV/Å³: the same sums in another order."""

RADIUS = 1e-10
"""Å, the adaptive cutoff against an independent root finder (tolerance of that one 1e-13)."""

SINGLE_FORCE = 1e-3
"""eV/Å, float32 network against float64: 1e-7 times 10⁴ operations on numbers of order 1."""

SINGLE_ENERGY = 1e-4
"""eV/atom, likewise."""


def close(a: torch.Tensor, b: torch.Tensor, atol: float) -> bool:
    """Fail unless all components agree absolutely; True, so that it may stand behind `assert`."""
    torch.testing.assert_close(a, b, rtol=0.0, atol=atol, check_dtype=False)
    return True
