"""Figures; the only place that knows matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coset.workflows.equivariance import Equivariance

MEV = 1e3
SMALLEST = 1e-3  # meV/atom shown; less is of no interest


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of its extension (png, svg, pdf)."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def spectrum_figure(results: Sequence[Equivariance], names: Sequence[str]) -> Figure:
    """Anisotropy by degree and parity, and what every level of averaging leaves of it (meV/atom).

    One row per structure.
    """
    figure = Figure(figsize=(9.0, 2.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), one, name in zip(axes, results, names, strict=True):
        assert one.spectrum is not None
        for parity, label, shift in ((1, "even", -0.2), (-1, "odd", 0.2)):
            own = [sector for sector in one.spectrum.sectors if sector.parity == parity]
            if own:
                heights = [MEV * sector.power**0.5 / one.n_atoms for sector in own]
                left.bar([sector.degree + shift for sector in own], heights, 0.4, label=label)
        title = f"{name}, {one.point_group}"
        left.set(xlabel="degree l", ylabel="rms energy, meV/atom", title=title)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(title="under inversion")
        levels = [level for level in one.levels if level.level != "none"]
        costs = [level.n_evaluations for level in levels]
        left_over = [max(MEV * level.residual / one.n_atoms, SMALLEST) for level in levels]
        right.loglog(costs, left_over, "o-", color="tab:green")
        for level, cost, value in zip(levels, costs, left_over, strict=True):
            right.annotate(level.level, (cost, value), (4, 4), textcoords="offset points")
        right.set(xlabel="evaluations", ylabel="rms error left, meV/atom")
        right.margins(x=0.25, y=0.15)
    return figure
