"""Protocol `eos-acwf`: equations of state of elements in four cubic structures.

    epsilon² = <(E_a - E_b)²> / sqrt(<(E_a - <E_a>)²> <(E_b - <E_b>)²>)

with means over volumes within 6 % of (V_a + V_b)/2 and both minima at zero energy, and

    nu = 100 sqrt(sum_Y [w_Y 2 (Y_a - Y_b)/(Y_a + Y_b)]²),   w = 1, 1/20, 1/400 of V0, B0, B1.

Reference: E. Bosoni et al., Nat. Rev. Phys. 6, 45 (2024), equations 1 and 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from coset.potential import Potential
from coset.protocols.metrics import GROUPS, error_metrics, finished, group_of
from coset.protocols.records import Entry, Found, Metric, Published, Row, Value
from coset.protocols.references import existing, read_cubic
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.eos import EosSettings, eos
from coset.workflows.eos_fit import birch_murnaghan

FILE = "acwf/results-unaries-verification-PBE-v1-AE-average.json"
VASP = "acwf/results-unaries-verification-PBE-v1-vasp.json"
VOLUME, BULK, SLOPE = "volume_A3_per_atom", "bulk_modulus_GPa", "bulk_modulus_derivative"
WEIGHTS = {VOLUME: 1.0, BULK: 1.0 / 20.0, SLOPE: 1.0 / 400.0}
EPSILON, NU = "epsilon", "nu"
LIMITS = {"excellent": {EPSILON: 0.06, NU: 0.10}, "good": {EPSILON: 0.20, NU: 0.33}}

# O and Cr to Ni, the lanthanides after La and the actinides: the reference has no spin and no U.
LEFT_OUT = (8, *range(24, 29), *range(58, 72), *range(89, 104))
QUADRATURE = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, kw_only=True, slots=True)
class EosAcwfProtocol:
    """Birch-Murnaghan fits to seven volumes within 6 % of the potential's own minimum.

    left_out: atomic numbers of elements for which magnetism or U matters.
    """

    name: ClassVar[str] = "eos-acwf"
    files: ClassVar[tuple[str, ...]] = (FILE,)
    packages: ClassVar[tuple[str, ...]] = ()
    parity: ClassVar[tuple[str, ...]] = (VOLUME, BULK)

    eos: EosSettings = field(
        default_factory=lambda: EosSettings(range=0.06, points=7, cell="fixed")
    )
    left_out: tuple[int, ...] = LEFT_OUT

    def entries(self, data: Path) -> list[Entry]:
        """Elements in cubic structures."""
        found = read_cubic(existing(data, FILE))
        return [one for one in found if not set(one.numbers) & set(self.left_out)]

    def measure(self, potential: Potential, entry: Entry) -> Found:
        """V0, B0, B1 and both distances from the reference."""
        (result,) = eos(potential, entry.structures, self.eos)
        if result.fit is None:
            return Found(status=result.status, code=result.code, reason=result.reason)
        own = {
            VOLUME: result.fit.volume / len(entry.numbers),
            BULK: result.fit.bulk_modulus_GPa,
            SLOPE: result.fit.bulk_modulus_derivative,
        }
        distances = {EPSILON: epsilon(own, entry.values), NU: nu(own, entry.values)}
        return Found(
            status=result.status,
            code=result.code,
            reason=result.reason,
            values=(
                *(Value(name=n, own=v, reference=entry.values[n]) for n, v in own.items()),
                *(Value(name=n, own=v) for n, v in distances.items()),
            ),
        )

    def summary(self, rows: Sequence[Row]) -> tuple[Metric, ...]:
        """Errors, medians of the distances, and how many are small."""
        done = finished(rows)
        return (
            *error_metrics(done, VOLUME, unit="A3_per_atom"),
            *error_metrics(done, BULK, unit="GPa"),
            *(metric for group in GROUPS for metric in _own_distances(done, group)),
        )

    def published(self, data: Path, keys: Sequence[str]) -> tuple[Published, ...]:
        """VASP with its potentials, over the same structures."""
        path = data / VASP
        if not path.is_file():
            return ()
        average, vasp = read_cubic(existing(data, FILE)), read_cubic(path)
        known = {one.key: one.values for one in average if one.key in set(keys)}
        pairs = [(one.values, known[one.key]) for one in vasp if one.key in known]
        distances = {
            name: np.array([distance(*pair) for pair in pairs])
            for name, distance in ((EPSILON, epsilon), (NU, nu))
        }
        metrics = _distance_metrics(distances, "all") if pairs else []
        return (Published(name="VASP, PBE", metrics=tuple(metrics)),)


def nu(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The distance of two fits by their parameters, percent."""
    shares = [
        weight * 2.0 * (one[name] - other[name]) / (one[name] + other[name])
        for name, weight in WEIGHTS.items()
    ]
    return 100.0 * float(np.linalg.norm(shares))


def epsilon(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The distance of two curves, relative to their own depth."""
    center = (one[VOLUME] + other[VOLUME]) / 2.0
    nodes, weights = QUADRATURE
    volumes = center * (1.0 + 0.06 * nodes)
    first, second = (
        birch_murnaghan(volumes, f[VOLUME], 0.0, f[BULK] / GPA_PER_EV_PER_A3, f[SLOPE])
        for f in (one, other)
    )

    def mean(values: np.ndarray) -> float:
        return float(weights @ values) / 2.0

    depth = mean((first - mean(first)) ** 2) * mean((second - mean(second)) ** 2)
    return float(np.sqrt(mean((first - second) ** 2) / np.sqrt(depth)))


def _own_distances(rows: Sequence[Row], group: str) -> list[Metric]:
    own = group_of(rows, group)
    found = {n: np.array([v.own for r in own if (v := r.value(n))]) for n in (EPSILON, NU)}
    return _distance_metrics(found, group) if own else []


def _distance_metrics(distances: Mapping[str, np.ndarray], group: str) -> list[Metric]:
    """The median, and how many are below the limits of the reference."""
    found = []
    for name, values in distances.items():
        numbers = {f"{name}_median": float(np.median(values))}
        for label, limits in LIMITS.items():
            numbers[f"{name}_{label}_percent"] = 100.0 * float((values < limits[name]).mean())
        found += [
            Metric(name=label, group=group, value=value, count=len(values))
            for label, value in numbers.items()
        ]
    return found
