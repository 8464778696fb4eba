"""Parity plots of the protocols: what a potential gives over what the reference has."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coset.protocols.records import Benchmark, Row

STYLES = (
    (False, "formula in the training split", "o", "tab:blue"),
    (True, "formula held out", "D", "tab:orange"),
)

LOGARITHMIC = ("kappa_W_per_mK",)
"""Values over orders of magnitude."""


def parity_figure(rows: Sequence[Row], benchmark: Benchmark) -> Figure:
    """One panel for each value of the protocol, or one for the long data of its rows."""
    names = benchmark.parity or ("frequency_THz",)
    figure = Figure(figsize=(5.0 * len(names), 5.0), layout="constrained")
    figure.suptitle(f"{benchmark.name}, {len(rows)} materials")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        pairs = {unseen: _pairs(rows, name, benchmark, unseen=unseen) for unseen in (False, True)}
        _panel(axes, pairs, name)
    return figure


def _pairs(
    rows: Sequence[Row], name: str, benchmark: Benchmark, *, unseen: bool
) -> list[tuple[float, float]]:
    """Reference and own value of the rows without fault."""
    own = [row for row in rows if row.unseen == unseen and row.status == "ok"]
    if not benchmark.parity:
        return [pair for row in own for pair in zip(row.reference, row.own, strict=True)]
    values = [value for row in own if (value := row.value(name)) is not None]
    return [(v.reference, v.own) for v in values if v.reference is not None]


def _panel(axes: Axes, pairs: dict[bool, list[tuple[float, float]]], name: str) -> None:
    everything = np.array([pair for some in pairs.values() for pair in some]).reshape(-1, 2)
    small = 4 if len(everything) > 300 else 18
    for unseen, label, marker, color in STYLES:
        points = np.array(pairs[unseen]).reshape(-1, 2)
        text = f"{label} ({len(points)})"
        axes.scatter(
            points[:, 0], points[:, 1], s=small, marker=marker, c=color, alpha=0.6, lw=0, label=text
        )
    if len(everything):
        ends = [min(0.0, float(everything.min())), 1.03 * float(everything.max())]
        axes.plot(ends, ends, color="0.4", linewidth=0.8, zorder=0)
        if name in LOGARITHMIC:
            ends[0] = float(everything[everything > 0.0].min()) / 1.5
            axes.set(xscale="log", yscale="log")
        axes.set(xlim=ends, ylim=ends)
        mae = float(np.abs(everything[:, 1] - everything[:, 0]).mean())
        axes.set_title(f"mean absolute error {mae:.3g}", fontsize="medium")
    axes.set(xlabel=f"reference {name}", ylabel=name, aspect="equal")
    axes.legend(fontsize="small", loc="upper left")
