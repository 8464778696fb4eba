"""Table and figure of benchmarks/results/phonons-cost.jsonl, for docs/phonons-cost.md.

Usage: python cost_report.py

Of each crystal and method the last row counts, as a run may have taken some methods only.
cost_intro.md and cost_notes.md are put above and below the table.
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results" / "phonons-cost.jsonl"
NAMES = {
    "exact irreducible": "coset exact, `--quick`",
    "exact project": "coset exact, `project`",
    "exact light": "coset exact, `light`",
    "exact standard": "coset exact, `standard`",
    "exact tight": "coset exact, `tight`",
    "displacements project": "coset displacements, `project`",
    "plain default": "phonopy, default displacements",
    "plain irreducible": "phonopy, irreducible ±",
    "plain all": "phonopy, all ±, symfc",
    "calculator 3 irreducible": "phonopy, irreducible ±, SymmetrizedCalculator",
}
SAME = 1.1
"""Errors that differ by less count as equal: there are six samples at most."""
COLORS = {"exact": "C0", "displacements": "C2", "plain": "C1", "calculator": "C3"}
MARKERS = "osD^vPX"
HEAD = (
    "| crystal | method | supercells x evaluations | samples | processor s | clock s | "
    "error THz | error of their mean | at equal error |"
)


def rows():
    """One of each crystal, in order."""
    found = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        methods = found.get(row["crystal"], {"methods": {}})["methods"] | row["methods"]
        ordered = {name: methods[name] for name in NAMES if name in methods}
        found[row["crystal"]] = row | {"methods": ordered}
    return list(found.values())


def is_ours(method):
    """Whether coset did it."""
    return method.split()[0] in ("exact", "displacements")


def candidates(row):
    """What we offer: (seconds, error, name), single samples and means of several.

    That a mean came out better than the root of its number promises is luck and does not count.
    """
    found = []
    for method, known in row["methods"].items():
        if not is_ours(method) or "errors_THz" not in known:
            continue
        single = known["errors_THz"][0]
        for count, error in enumerate(known["errors_THz"], 1):
            name = method if count == 1 else f"{method} x{count}"
            found.append((known["seconds"] * count, max(error, single / count**0.5), name))
    return sorted(found)


def equal_error(row, known):
    """How the fastest of ours that errs no more compares with a method of theirs."""
    if "errors_THz" not in known:
        return ""
    for seconds, error, name in candidates(row):
        if error <= SAME * known["errors_THz"][0]:
            return f"{known['seconds'] / seconds:.2g} ({name}, {error:.2g})"
    return "none as good"


def table(row):
    """Lines of one crystal."""
    lines = []
    for method, known in row["methods"].items():
        ours, errors = is_ours(method), known.get("errors_THz", [])
        count = "" if ours else f"{known['supercells']} x {known['evaluations']}"
        clock, cpu = known["seconds"], known["processor_seconds"]
        error = f"{errors[0]:.2g}" if errors else ""
        mean = f"{errors[-1]:.2g}" if len(errors) > 1 else ""
        lines.append(
            f"| {row['crystal']} | {NAMES[method]} | {count} | {known['samples'] or 'estimate'} | "
            f"{cpu:.3g} | {clock:.3g} | {error} | {mean} | "
            f"{'' if ours else equal_error(row, known)} |"
        )
    return lines


def crystal_line(row):
    """What was compared."""
    level, count = row["reference"]
    mesh = "x".join(map(str, row["mesh"]))
    return (
        f"* {row['crystal']}: {row['atoms']} atoms in the primitive cell, group "
        f"{row['space_group']}, supercell {mesh}, {row['wave_vectors']} wave vectors, frequencies "
        f"from {row['lowest_THz']:.2f} to {row['highest_THz']:.2f} THz; reference: `{level}`, "
        f"{count} offsets" + (f", ± {row['reference_error_THz']:.1g} THz." if count > 1 else ".")
    )


def page(found):
    """The whole page."""
    first = found[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [
        "# What phonons cost at equal error",
        "",
        *(HERE / "cost_intro.md").read_text(encoding="utf-8").splitlines(),
        "",
        f"* Model: {first['model']}, the same checkpoint on both sides, float64.",
        f"* Versions: {versions}.",
        *map(crystal_line, found),
        "",
        HEAD,
        "|---|---|---|---|---|---|---|---|---|",
        *(line for row in found for line in table(row)),
        "",
        "![Error against time](phonons-cost.png)",
        "",
        *(HERE / "cost_notes.md").read_text(encoding="utf-8").splitlines(),
    ]
    return "\n".join(lines) + "\n"


def figure(found, path):
    """Error against time, means of 1, 2, ... samples."""
    shown = [row for row in found if any("errors_THz" in x for x in row["methods"].values())]
    canvas, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 4.2), squeeze=False)
    lines = {}
    for axis, row in zip(axes[0], shown, strict=True):
        for method, known in row["methods"].items():
            if "errors_THz" not in known:
                continue
            errors = known["errors_THz"]
            times = [known["seconds"] * n for n in range(1, len(errors) + 1)]
            kind = method.split()[0]
            group = [name for name in NAMES if name.startswith(kind)]
            style = MARKERS[group.index(method)], COLORS[kind]
            axis.loglog(times, errors, "-", color=style[1], linewidth=0.8, alpha=0.5)
            (lines[method],) = axis.loglog(
                times[:1], errors[:1], style[0], color=style[1], label=method
            )
        axis.set_title(row["crystal"])
        axis.set_xlabel("time (s)")
        axis.set_xlim(0.1, 300)
        axis.grid(color="0.92")
    axes[0, 0].set_ylabel("largest error of a frequency (THz)")
    canvas.legend(lines.values(), lines.keys(), loc="lower center", ncols=4, fontsize=8)
    canvas.tight_layout(rect=(0, 0.13, 1, 1))
    canvas.savefig(path, dpi=130)


def main() -> None:
    """Write both."""
    found = rows()
    (ROOT / "docs" / "phonons-cost.md").write_text(page(found), encoding="utf-8")
    figure(found, ROOT / "docs" / "phonons-cost.png")


if __name__ == "__main__":
    main()
