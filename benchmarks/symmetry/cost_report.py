"""The table and the plot of cost.py: docs/symmetry-cost.md and docs/symmetry-cost.png.

Usage: python cost_report.py --model LABEL [--machine TEXT] [--command TEXT]

Takes the last row of every crystal that was measured with this model, and adds cost_notes.md.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "symmetry-cost.jsonl"
DOCS = HERE.parent.parent / "docs"
LEVELS = ("project", "standard", "tight")
DEFAULT = "calculator 3"
ENERGY, FORCES, STRESS = "energy_meV_per_atom", "forces_meV_per_A", "stress_GPa"
NAMES = {
    "none": "one evaluation",
    "plain": "one evaluation (metatomic)",
    "project": "coset `project`",
    "standard": "coset `standard`",
    "tight": "coset `tight`",
    "calculator 3": "SymmetrizedCalculator 3 (default)",
    "calculator 3 proper": "SymmetrizedCalculator 3, no inversion",
    "calculator 3 group": "SymmetrizedCalculator 3, space group",
    "calculator 5": "SymmetrizedCalculator 5",
    "calculator 5 proper": "SymmetrizedCalculator 5, no inversion",
    "calculator 7": "SymmetrizedCalculator 7",
    "calculator 7 proper": "SymmetrizedCalculator 7, no inversion",
    "model": "SymmetrizedModel (default)",
    "model 3": "SymmetrizedModel 3",
    "model 5": "SymmetrizedModel 5",
    "model 7": "SymmetrizedModel 7",
}
FAMILIES = {
    "coset": (LEVELS, "o-", "C0"),
    "SymmetrizedCalculator": (("calculator 3", "calculator 5", "calculator 7"), "s--", "C1"),
    "no inversion": (
        ("calculator 3 proper", "calculator 5 proper", "calculator 7 proper"), "^:", "C2",
    ),
    "SymmetrizedModel": (("model", "model 3", "model 5", "model 7"), "d-.", "C3"),
}  # fmt: skip
ROUNDING = 1e-6
"""In the unit of each error: below, both are zero by symmetry."""
TEXT = """# What rotational averaging costs

The energy of an unconstrained model depends a little on how a crystal lies in space. An average
over rotations removes that; this page compares what `coset.evaluate` pays for it with the two
averages of metatomic, SymmetrizedCalculator and SymmetrizedModel, on the same checkpoint: energy,
forces and stress in float64, one thread each, in turn on one machine.

{facts}

Errors are root mean squares over random orientations: energy (meV/atom), largest force component
(meV/Å) and largest stress component (GPa), against a mean over {references} random offsets of rules
of degree 9. Evaluations count rotated copies of the cell that is evaluated: coset evaluates the
primitive cell. Times are medians of a whole call, symmetry detection included: on the clock and of
the processor, which other work on the machine disturbs less.

## At no larger error than the default of the other

The cheapest level of coset whose three errors are all at most those of the other method (`any
offset`: the same for its rules with random offsets), and how many times fewer evaluations and less
time that takes. Goals: 10 times fewer evaluations for m-3m and 2.5 times for the others, 20 and 5
times less time; half of these against SymmetrizedModel.

{verdicts}

![Error against evaluations and against time](symmetry-cost.png)

## All methods

`-`: the call takes minutes and was not made.

{tables}
"""


def rows_of(model):
    """The last row of each crystal."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return list({row["crystal"]: row for row in rows if row["model"] == model}.values())


def as_table(head, lines):
    """Markdown."""
    ruler = "|" + "---|" * len(head)
    return "\n".join(["| " + " | ".join(line) + " |" for line in [head]] + [ruler] + [
        "| " + " | ".join(line) + " |" for line in lines
    ])  # fmt: skip


def errors_text(errors):
    """Energy, forces, stress."""
    return [
        f"{errors[key]:.2g}" if errors[key] > ROUNDING else "0" for key in (ENERGY, FORCES, STRESS)
    ]


def cheapest(row, other, ours):
    """Our cheapest level whose errors are at most those of another method, or None."""
    limits = row["errors"][other]
    for level in LEVELS:
        if all(ours[level][key] <= max(limits[key], ROUNDING) for key in limits):
            return level
    return None


def verdict(row, other, part):
    """One line: what it takes to be as good as another method, and whether a goal is met."""
    goals = [part * goal for goal in ((10.0, 20.0) if row["point_group"] == "m-3m" else (2.5, 5.0))]
    level = cheapest(row, other, row["errors"])
    anyhow = cheapest(row, other, row["errors"] | row["offset_errors"])
    start = [row["crystal"], row["point_group"], NAMES[other]]
    if level is None:
        return [*start, "none", *["-"] * 5, "**missed**: no level is as good"]
    counts = [row["evaluations"][name] for name in (other, level)]
    clock, processor = (
        row[kind][other] / row[kind][level] for kind in ("seconds", "processor_seconds")
    )
    ratios = counts[0] / counts[1], clock
    missed = [
        f"{what} ({ratio:.3g} of {goal:g})"
        for what, ratio, goal in zip(("evaluations", "time"), ratios, goals, strict=True)
        if ratio < goal
    ]
    return [
        *start,
        f"`{level}`",
        "none" if anyhow is None else f"`{anyhow}`",
        f"{counts[0]} : {counts[1]}",
        f"{ratios[0]:.3g}",
        f"{clock:.3g}",
        f"{processor:.3g}",
        "**missed**: " + ", ".join(missed) if missed else "met",
    ]


def all_methods(row):
    """The table of one crystal."""
    lines = []
    for method, name in NAMES.items():
        if method not in row["errors"]:
            lines.append([name, str(row["evaluations"][method]), *["-"] * 8])
            continue
        lines.append(
            [
                name,
                str(row["evaluations"][method]),
                f"{1e3 * row['seconds'][method]:.0f}",
                f"{1e3 * row['processor_seconds'][method]:.0f}",
                *errors_text(row["errors"][method]),
                *errors_text(row["aligned_errors"][method]),
            ]
        )
        if method in row["offset_errors"]:
            any_offset = errors_text(row["offset_errors"][method])
            lines.append([f"{name}, any offset", *["-"] * 3, *any_offset, *["-"] * 3])
    head = ["method", "evaluations", "ms", "ms, processor", "energy", "forces", "stress"]
    title = (
        f"### {row['crystal']}: atoms {row['atoms']}, primitive cell {row['primitive_atoms']}, "
        f"space group {row['space_group']}, {row['point_group']}"
    )
    left = ", ".join(errors_text(row["reference_error"]))
    note = f"Standard errors of the reference: {left}. The last three columns: cell along the axes."
    return "\n\n".join([title, as_table([*head, "energy", "forces", "stress"], lines), note])


def plot(rows):
    """Error of the energy against evaluations and against time, a column of panels per crystal."""
    mpl.rcParams.update({"font.size": 8})
    figure, axes = plt.subplots(
        2, len(rows), figsize=(2.4 * len(rows), 4.4), sharey="col", squeeze=False
    )
    for column, row in enumerate(rows):
        for axis, costs, label in (
            (axes[0, column], row["evaluations"], "evaluations"),
            (axes[1, column], row["seconds"], "seconds"),
        ):
            for name, (methods, style, color) in FAMILIES.items():
                own = [method for method in methods if method in row["errors"]]
                errors = [row["errors"][method][ENERGY] for method in own]
                axis.loglog(
                    [costs[m] for m in own], errors, style, color=color, label=name, markersize=4
                )
            axis.set_xlabel(label)
        axes[0, column].set_title(f"{row['crystal']}, {row['point_group']}")
    for axis in axes[:, 0]:
        axis.set_ylabel("error, meV/atom")
    figure.tight_layout(rect=(0.0, 0.05, 1.0, 1.0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.savefig(DOCS / "symmetry-cost.png", dpi=100, metadata={"Software": None})


def main() -> None:
    """Write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="label given to cost.py")
    parser.add_argument("--machine", default="")
    parser.add_argument("--command", default="python benchmarks/symmetry/cost.py MODEL.ckpt ...")
    options = parser.parse_args()
    rows = rows_of(options.model)
    first = rows[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    random, few = first["orientations"]
    facts = [
        f"* Model: {options.model}.",
        f"* Machine: {options.machine or first['machine']}, {first['threads']} thread.",
        f"* Versions: {versions}.",
        f"* Orientations: {random} random ones ({few} for degrees 5 and 7 of metatomic).",
        f"* Command: `{options.command}`, then `cost_report.py`.",
    ]
    head = [
        "crystal",
        "group",
        "against",
        "level",
        "any offset",
        "evaluations",
        "ratio",
        "time",
        "processor",
        "goals",
    ]
    verdicts = [
        *(verdict(row, DEFAULT, 1.0) for row in rows),
        *(verdict(row, "model", 0.5) for row in rows),
        *(verdict(row, "model 3", 0.5) for row in rows),
    ]
    page = TEXT.format(
        facts="\n".join(facts),
        references=first["references"],
        verdicts=as_table(head, verdicts),
        tables="\n\n".join(all_methods(row) for row in rows),
    )
    page += "\n" + (HERE / "cost_notes.md").read_text(encoding="utf-8")
    (DOCS / "symmetry-cost.md").write_text(page, encoding="utf-8")
    plot(rows)


if __name__ == "__main__":
    main()
