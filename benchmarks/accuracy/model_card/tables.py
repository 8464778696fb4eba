"""Results as the Markdown tables of a card: a column for each potential."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from model_card.diatomics import BINS
from model_card.eos import STRUCTURES
from model_card.speed import CASES

Results = dict[str, Any]
Path = tuple[str, ...]
SHOWN = 6

ERRORS = """### Errors

Mean absolute errors: energy (meV/atom) / force components (meV/Å) / stress components (meV/Å³), and
in brackets the median force error of the frames. Frames of `unseen` formulas are held out from
training, those of `seen` formulas may have been in it (not those of mpf-TP, only their formulas).
corpus-valid has labels of another potential and held-out formulas only. `shared` is a random subset
of the crystals."""

EOS = """### Equations of state

Elements in four cubic structures (without O, Cr to Ni, f elements), against all-electron PBE;
errors in %: median / mean absolute / worst."""

CRYSTALS = """### Common crystals

Relaxed from their PBE geometry; errors in %: median / mean absolute / worst."""

BULK = """### Bulk moduli of random binaries

Against the Materials Project, from central differences of the pressure with relaxed ions, mean of
fixed and relaxed shape. `shared`: the part that all potentials were measured on."""

DIATOMICS = """### Two atoms

Energy curves of common pairs from 0.5 to 6 Å, and the error of the force along the bond against
PBE (homonuclear, median, eV/Å) by the distance in sums of covalent radii."""

CHECKS = """### Checks"""
SPEED = """### Speed

Energy, forces and stress with one thread: atoms per second (ms per call)."""
LIST = """### Lattice constants and bulk moduli, crystal by crystal

Errors in %; `*` marks unseen formulas; a, b, c are the vectors of the reference cell where they
differ in length. Hexagonal and magnetic elements: cube root of the volume."""


def markdown(results: Sequence[Results]) -> str:
    """All tables of the parts that were measured."""
    sections = (
        (ERRORS, _errors(results)),
        (EOS, _eos(results)),
        (CRYSTALS, _crystals(results)),
        (BULK, _bulk(results)),
        (DIATOMICS, _diatomics(results)),
        (CHECKS, _checks(results)),
        (SPEED, _speed(results)),
        (LIST, _list(results)),
    )
    head = ["", *(f"{one['name']} ({one['parameters']:,} parameters)" for one in results)]
    texts = []
    for title, rows in sections:
        filled = [row for row in rows if any(row[1:])]
        if filled:
            texts.append(f"{title}\n\n{_table([head, *filled])}")
    return "\n\n".join(texts)


def _table(rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell or "-" for cell in row) + " |" for row in rows]
    lines[0] = lines[0].replace("| - |", "| |", 1)
    width = lines[0].count("|") - 1
    return "\n".join([lines[0], "|---" * width + "|", *lines[1:]])


def _at(one: Results, *path: str) -> Any:
    """What lies at a path in the parts, None if it is not there."""
    found: Any = one["parts"]
    for key in path:
        if found is None:
            return None
        found = found.get(key)
    return found


def _row(label: str, results: Sequence[Results], cell: Callable[[Results], str]) -> list[str]:
    """One row: a cell for each potential, empty where it was not measured."""
    return [label, *(cell(one) for one in results)]


def _number(path: Path, spec: str = ".3g") -> Callable[[Results], str]:
    """Writes the number at a path."""

    def cell(one: Results) -> str:
        value = _at(one, *path)
        return "" if value is None else format(value, spec)

    return cell


def _spread(path: Path) -> Callable[[Results], str]:
    """Writes the errors at a path: median / mean absolute / worst, with its name."""

    def cell(one: Results) -> str:
        found = _at(one, *path)
        if not found or not found["count"]:
            return ""
        numbers = f"{found['median_absolute']:.2f} / {found['mae']:.2f} / {found['worst']:+.1f}"
        return f"{numbers} ({found['worst_name']}), n = {found['count']}"

    return cell


def _errors(results: Sequence[Results]) -> list[list[str]]:
    rows = []
    for name in dict.fromkeys(name for one in results for name in _at(one, "errors") or {}):
        for group in ("all", "unseen", "seen", "shared"):
            found = [_at(one, "errors", name, group) for one in results]
            sizes = [one["frames_in_set"] for one in found if one]
            if sizes:
                label = f"{name}, {group} ({max(sizes):,})"
                rows.append([label, *(_error_cell(one) for one in found)])
    return rows


def _error_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    keys = ("energy_mae_meV_per_atom", "forces_mae_meV_per_A", "stress_mae_meV_per_A3")
    means = ("-" if found[key] is None else f"{found[key]:.3g}" for key in keys)
    fewer = "" if found["frames"] == found["frames_in_set"] else f", {found['frames']:,} frames"
    median = found["forces_median_of_frames_meV_per_A"]
    return f"{' / '.join(means)} ({median:.3g}){fewer}"


def _eos(results: Sequence[Results]) -> list[list[str]]:
    base = ("eos", "errors_percent")
    rows = [
        _row(f"{words}, {group}", results, _spread((*base, group, quantity)))
        for quantity, words in (("volume", "volume"), ("bulk_modulus", "bulk modulus"))
        for group in ("all", *STRUCTURES, "noble gases")
    ]
    return [*rows, _row("without a minimum", results, _count(("eos", "without_minimum")))]


def _crystals(results: Sequence[Results]) -> list[list[str]]:
    base = ("lattice", "errors_percent")
    rows = [
        _row(f"{words}, {group}", results, _spread((*base, group, quantity)))
        for quantity, words in (("lengths", "lattice constants"), ("bulk_modulus", "bulk moduli"))
        for group in ("all", "unseen", "seen")
    ]
    return [*rows, _row("not converged", results, _count(("lattice", "not_converged")))]


def _bulk(results: Sequence[Results]) -> list[list[str]]:
    rows = []
    for group in ("all", "unseen", "seen", "shared"):
        rows += [
            _row(
                f"mean absolute error (GPa), {group}", results, _number(("bulk", group, "mae_GPa"))
            ),
            _row(f"errors in %, {group}", results, _spread(("bulk", group, "percent"))),
            _row(f"correlation, {group}", results, _number(("bulk", group, "correlation"))),
        ]
    return [*rows, _row("failed", results, _count(("bulk", "failed")))]


def _diatomics(results: Sequence[Results]) -> list[list[str]]:
    curves = ("diatomics", "curves")
    rows = [
        _row("pairs", results, _number((*curves, "sound_pairs"))),
        _row("with a hole inside the bond", results, _count((*curves, "holes_eV"))),
        _row("somewhere attractive inside the bond", results, _count((*curves, "attractions_eV"))),
        _row("with spurious extrema", results, _count((*curves, "spurious_extrema"))),
    ]
    for low, high in pairwise(BINS):
        for group in ("unseen", "seen"):
            path = ("diatomics", "forces", f"{low}-{high}", group, "median_eV_per_A")
            rows.append(
                _row(f"force error at {low}-{high}, {group} elements", results, _number(path))
            )
    return rows


def _checks(results: Sequence[Results]) -> list[list[str]]:
    relaxation, rotation = ("checks", "relaxation"), ("checks", "rotation")
    force = ("checks", "gradient", "largest_force_error_eV_per_A")
    stress = ("checks", "gradient", "largest_stress_error_eV_per_A3")
    return [
        _row("example crystals relaxed", results, _number((*relaxation, "crystals"))),
        _row("converged", results, _number((*relaxation, "converged"))),
        _row("space group kept", results, _number((*relaxation, "group_kept"))),
        _row("volume within 25 %", results, _number((*relaxation, "within_25_percent"))),
        _row(
            "largest change of volume (%)",
            results,
            _number((*relaxation, "largest_volume_change_percent")),
        ),
        _row("forces against differences of the energy (eV/Å)", results, _largest(force)),
        _row("stress against differences of the energy (eV/Å³)", results, _largest(stress)),
        _row(
            "energy under rotations, rms (meV/atom)",
            results,
            _number((*rotation, "energy_rms_meV_per_atom")),
        ),
        _row(
            "forces under rotations, rms (meV/Å)",
            results,
            _number((*rotation, "forces_rms_meV_per_A")),
        ),
    ]


def _speed(results: Sequence[Results]) -> list[list[str]]:
    def cell(name: str) -> Callable[[Results], str]:
        def write(one: Results) -> str:
            found = _at(one, "speed", name)
            if not found:
                return ""
            return f"{found['atoms_per_second']:,.0f} ({found['ms_per_call']:.3g})"

        return write

    return [_row(name, results, cell(name)) for name in CASES]


def _list(results: Sequence[Results]) -> list[list[str]]:
    rows = []
    base = ("lattice", "crystal_errors_percent")
    for name in dict.fromkeys(name for one in results for name in _at(one, *base) or {}):
        found = [_at(one, *base, name) for one in results]
        mark = "*" if any(one and one["unseen"] for one in found) else ""
        rows.append([f"{name}{mark}", *(_crystal_cell(one) for one in found)])
    return rows


def _crystal_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    lengths = ", ".join(f"{axis} {error:+.2f}" for axis, error in found["lengths"].items())
    modulus = found["bulk_modulus"]
    return lengths if modulus is None else f"{lengths}; K {modulus:+.0f}"


def _count(path: Path) -> Callable[[Results], str]:
    """Writes how many there are at a path, and the first of their names."""

    def cell(one: Results) -> str:
        found = _at(one, *path)
        if not found:
            return "" if found is None else "0"
        names = ", ".join(list(found)[:SHOWN])
        return f"{len(found)} ({names}{', ...' if len(found) > SHOWN else ''})"

    return cell


def _largest(path: Path) -> Callable[[Results], str]:
    """Writes the largest of the numbers at a path."""

    def cell(one: Results) -> str:
        found = _at(one, *path)
        return f"{max(found.values()):.1e}" if found else ""

    return cell
