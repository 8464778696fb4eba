"""Figures of phonons."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coset.workflows.phonons.results import Bands, Dos, PhononResult

BAND_COLOR, DOS_COLOR, IMAGINARY_COLOR = "#1f4e8c", "#5b7fa8", "#b3262a"
SMALL = 0.05
"""THz: less below zero is drawn as zero."""


def phonon_figure(found: PhononResult, name: str) -> Figure:
    """Bands with their standard errors, and the DOS beside them on the same frequency axis."""
    figure = Figure(figsize=(8.0, 4.6))
    figure.set_layout_engine("constrained", wspace=0.02)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4.0, 1.0))
    _bands(left, found.bands)
    _dos(right, found.dos)
    low, high = _limits(found.bands.frequency_THz)
    left.set_ylim(low, high)
    left.set_ylabel("frequency, THz")
    left.set_title(_title(found, name), loc="left", fontsize=10)
    for axes in (left, right):
        axes.axhline(0.0, color="0.4", linewidth=0.8, zorder=1)
        if low < -SMALL:
            axes.axhspan(low, 0.0, color=IMAGINARY_COLOR, alpha=0.06, linewidth=0.0)
        axes.tick_params(direction="in")
    if low < -SMALL:
        left.text(
            0.01, low + 0.02 * (high - low), "imaginary", color=IMAGINARY_COLOR, fontsize=8,
            transform=left.get_yaxis_transform(),
        )  # fmt: skip
    return figure


def _title(found: PhononResult, name: str) -> str:
    group = f", space group {found.space_group}" if found.space_group else ""
    return f"{name}{group}: {found.verdict.kind}"


def _bands(axes: Axes, bands: Bands) -> None:
    path = bands.path
    for first, last in path.segments:
        own = slice(first, last + 1)
        x, values = path.distances[own], bands.frequency_THz[own]
        if bands.error_THz is not None:
            for branch in range(values.shape[1]):
                error = bands.error_THz[own, branch]
                low, high = values[:, branch] - error, values[:, branch] + error
                axes.fill_between(x, low, high, color=BAND_COLOR, alpha=0.25, linewidth=0.0)
        axes.plot(x, values, color=BAND_COLOR, linewidth=1.1, solid_capstyle="round")
    places, labels = _ticks(bands)
    for place in places:
        axes.axvline(place, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xticks(places, labels)
    axes.set_xlim(path.distances[0], path.distances[-1])


def _ticks(bands: Bands) -> tuple[list[float], list[str]]:
    """Ends of the pieces; where the path jumps, both names."""
    path = bands.path
    places, labels = [float(path.distances[0])], [_subscripted(path.labels[0][0])]
    for number, (_, last) in enumerate(path.segments):
        places.append(float(path.distances[last]))
        end = path.labels[number][1]
        begins = path.labels[number + 1][0] if number + 1 < len(path.labels) else end
        names = [end] if begins == end else [end, begins]
        labels.append("|".join(_subscripted(one) for one in names))
    return places, labels


def _subscripted(label: str) -> str:
    """`X_1` with its number below the line."""
    name, _, index = label.partition("_")
    return rf"${{\rm {name}}}_{{{index}}}$" if index else name


def _dos(axes: Axes, dos: Dos) -> None:
    axes.fill_betweenx(
        dos.frequency_THz, 0.0, dos.states, color=DOS_COLOR, alpha=0.35, linewidth=0.0
    )
    axes.plot(dos.states, dos.frequency_THz, color=DOS_COLOR, linewidth=1.0)
    axes.set_xlim(0.0, 1.08 * float(dos.states.max()))
    axes.set_xlabel("states per THz")


def _limits(frequencies: np.ndarray) -> tuple[float, float]:
    """A margin above the highest and below the lowest frequency."""
    high, low = 1.05 * float(frequencies.max()), float(frequencies.min())
    return (1.1 * low if low < -SMALL else 0.0), high
