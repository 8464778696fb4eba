"""Runs of the named protocols side by side, over the materials that all models were given.

Usage: python protocol_report.py FOLDER... [--figure docs/protocols.png]

FOLDER: of a run of `coset bench` or `protocol_peers.py`. Prints tables for docs/protocols.md,
writes the same numbers to benchmarks/results/protocols.json, and draws what the models give over
the reference. Models are compared over the materials where none of them has a fault.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np

from coset.analysis.protocol_plots import LOGARITHMIC
from coset.protocols import PROTOCOLS
from coset.protocols.manifest import Manifest
from coset.protocols.metrics import finished
from coset.protocols.results import begin

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results" / "protocols.json"
LABELS = {"": "frequency, THz", "bulk_modulus_GPa": "bulk modulus, GPa"} | {
    "shear_modulus_GPa": "shear modulus, GPa",
    "heat_capacity_J_per_mol_K": "heat capacity, J/mol/K",
    "kappa_W_per_mK": "conductivity, W/mK",
}


class Run:
    """One folder: the model, the hashes, the records in the order of their keys."""

    def __init__(self, folder):
        """Read it."""
        document = json.loads((folder / "manifest.json").read_text())
        document.pop("sha256")
        manifest = Manifest(**document)
        self.protocol, self.model = manifest.protocol, manifest.potential["name"]
        self.settings, self.manifest = manifest.settings_sha256[:12], manifest.sha256[:12]
        self.rows = begin(folder, manifest)

    def facts(self):
        """How much, how long, and what went wrong."""
        rows = self.rows.values()
        seconds = [row.seconds for row in rows]
        faults = Counter(row.code or row.status for row in rows if row.status != "ok")
        return {
            "model": self.model,
            "settings": self.settings,
            "manifest": self.manifest,
            "materials": len(rows),
            "without_fault": len(finished(list(rows))),
            "faults": dict(faults.most_common()),
            "seconds_in_all": round(sum(seconds)),
            "seconds_median": round(float(np.median(seconds)), 2),
        }

    def metrics(self, keys):
        """Of the materials with these keys, all groups of formulas together."""
        benchmark = PROTOCOLS[self.protocol]()
        found = benchmark.summary([self.rows[key] for key in keys])
        return {m.name: m.value for m in found if m.group == "all"}


def compared(runs):
    """Facts of every run, and metrics over its own materials and over the common ones."""
    given = set.intersection(*(set(run.rows) for run in runs))
    common = sorted(key for key in given if all(run.rows[key].status == "ok" for run in runs))
    return {
        "runs": [run.facts() | {"metrics": run.metrics(run.rows)} for run in runs],
        "given_to_all": len(given),
        "common": len(common),
        "common_metrics": {run.model: run.metrics(common) for run in runs},
    }


def tables(protocol, found):
    """Markdown."""
    lines = [f"### {protocol}", ""]
    lines += ["| model | materials | without fault | faults | median s | minutes | settings |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for run in found["runs"]:
        faults = ", ".join(f"{count} {code}" for code, count in run["faults"].items()) or "-"
        lines.append(
            f"| {run['model']} | {run['materials']} | {run['without_fault']} | {faults} | "
            f"{run['seconds_median']:.3g} | {run['seconds_in_all'] / 60:.3g} | "
            f"`{run['settings']}` |"
        )
    models = list(found["common_metrics"])
    whole = found["runs"][0]
    several = len(models) > 1
    heads = [f"{whole['model']}, all {whole['without_fault']}"]
    heads += [f"{model}, {found['common']} common" for model in models] if several else []
    lines += ["", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, value in whole["metrics"].items():
        others = [found["common_metrics"][m].get(name, float("nan")) for m in models]
        cells = [value, *(others if several else [])]
        lines.append(f"| {name} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")
    return "\n".join(lines)


def figure(groups, path):
    """One panel for each value with a reference, the models in colors."""
    panels = [
        (runs, name)
        for protocol, runs in groups.items()
        for name in (PROTOCOLS[protocol]().parity or (("",) if protocol.startswith("freq") else ()))
        if name in LABELS
    ]
    size = (4.2 * len(panels), 4.4)
    canvas, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (runs, name) in zip(axes[0], panels, strict=True):
        lowest, highest, smallest = 0.0, 0.0, np.inf
        for number, run in enumerate(runs):
            pairs = np.array(list(points(run, name)))
            lowest, highest = min(lowest, pairs.min()), max(highest, np.quantile(pairs, 0.998))
            smallest = min(smallest, pairs[pairs > 0.0].min())
            axis.scatter(*pairs.T, s=9, alpha=0.5, lw=0, color=f"C{number}", label=run.model)
        ends = [lowest, 1.05 * highest]
        if name in LOGARITHMIC:
            ends = [smallest / 1.5, 1.5 * highest]
            axis.set(xscale="log", yscale="log")
        axis.plot(ends, ends, color="0.4", linewidth=0.8, zorder=0)
        axis.set(xlim=(max(0.0, ends[0]), ends[1]), ylim=ends, title=runs[0].protocol)
        axis.set(xlabel=f"{LABELS[name]}, reference", ylabel=LABELS[name])
        axis.legend(fontsize=8, loc="upper left")
    canvas.savefig(path, dpi=110)


def points(run, name):
    """Reference and own value of the materials without fault."""
    for row in finished(list(run.rows.values())):
        if not name:
            yield from zip(row.reference, row.own, strict=True)
        elif (value := row.value(name)) is not None and value.reference is not None:
            yield value.reference, value.own


def main():
    """Read, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    groups = {}
    for folder in options.folders:
        run = Run(folder)
        groups.setdefault(run.protocol, []).append(run)
    found = {protocol: compared(runs) for protocol, runs in groups.items()}
    for protocol, one in found.items():
        print(tables(protocol, one), end="\n\n")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if options.figure:
        figure(groups, options.figure)


if __name__ == "__main__":
    main()
