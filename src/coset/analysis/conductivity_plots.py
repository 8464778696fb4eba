"""Figures of thermal conductivity."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from coset.workflows.conductivity.results import ConductivityResult, Modes

NM = 0.1  # per Å
LABELS = {"rta": "relaxation times", "wigner": "with coherences", "lbte": "Boltzmann equation"}
COLORS = {"rta": "#5b7fa8", "wigner": "#1f4e8c", "lbte": "#c8742b"}


def conductivity_figure(found: ConductivityResult, name: str) -> Figure:
    """Kappa over temperature for every method, and its sum up to a frequency and a free path."""
    kappa = found.kappa
    assert kappa is not None
    figure = Figure(figsize=(12.0, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    place = int(np.abs(kappa.temperatures - 300.0).argmin())
    mean = mean_of(kappa.by_method[found.method])[place]
    group = f", space group {found.space_group}" if found.space_group else ""
    error = "" if found.error is None else f" ± {mean_of(found.error)[place]:.2g}"
    figure.suptitle(
        f"{name}{group}: κ({kappa.temperatures[place]:g} K) = {mean:.4g}{error} W/mK, "
        f"{LABELS[found.method]}"
    )
    (_by_method if len(kappa.temperatures) == 1 else _over_temperature)(left, found)
    _over_frequency(middle, kappa.modes, place)
    _over_path(right, kappa.modes, place)
    return figure


def mean_of(tensors: np.ndarray) -> np.ndarray:
    """A third of the trace of tensors [temperatures, 3, 3]."""
    return np.asarray(np.trace(tensors, axis1=1, axis2=2) / 3.0)


def cumulative(keys: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys in ascending order and the sum of the shares up to each."""
    order = np.argsort(keys, axis=None)
    return keys.ravel()[order], np.cumsum(shares.ravel()[order])


def _over_temperature(axes: Axes, found: ConductivityResult) -> None:
    kappa = found.kappa
    assert kappa is not None
    for method, values in kappa.by_method.items():
        own = found.error if method == found.method else None
        axes.errorbar(
            kappa.temperatures,
            mean_of(values),
            None if own is None else mean_of(own),
            fmt="o-",
            markersize=4.0,
            linewidth=1.8 if method == found.method else 1.0,
            color=COLORS[method],
            label=LABELS[method],
        )
    if kappa.temperatures.max() > 2.0 * kappa.temperatures.min():
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(kappa.temperatures, [f"{t:g}" for t in kappa.temperatures])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set(xlabel="temperature, K", ylabel="κ = trace/3, W/mK")
    axes.legend(fontsize="small")


def _by_method(axes: Axes, found: ConductivityResult) -> None:
    """Bars, for a single temperature."""
    kappa = found.kappa
    assert kappa is not None
    for place, (method, values) in enumerate(kappa.by_method.items()):
        own = found.error if method == found.method else None
        error = None if own is None else mean_of(own)
        axes.bar(place, mean_of(values)[0], 0.6, yerr=error, color=COLORS[method], capsize=4.0)
    axes.set_xticks(range(len(kappa.by_method)), [LABELS[method] for method in kappa.by_method])
    axes.set_xlim(-0.8, len(kappa.by_method) - 0.2)
    axes.set_ylabel("κ = trace/3, W/mK")


def _over_frequency(axes: Axes, modes: Modes, place: int) -> None:
    """The sum as a line, and its slope as bars."""
    keys, total = cumulative(modes.frequency_THz, modes.share[place])
    axes.plot(keys, total, color=COLORS["wigner"])
    top = max(float(keys[-1]), 1e-9)
    heights, edges = np.histogram(
        modes.frequency_THz, bins=60, range=(0.0, top), weights=modes.share[place]
    )
    other = axes.twinx()
    other.stairs(heights / np.diff(edges), edges, fill=True, color=COLORS["rta"], alpha=0.35)
    other.set_ylabel("dκ/df, W/mK/THz")
    other.set_ylim(bottom=0.0)
    axes.set(xlabel="frequency f, THz", ylabel="κ of modes below f, W/mK")
    axes.set_xlim(0.0, 1.02 * top)
    axes.set_ylim(bottom=0.0)
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)


def _over_path(axes: Axes, modes: Modes, place: int) -> None:
    """From the path that leaves a thousandth of kappa."""
    keys, total = cumulative(modes.mean_free_path[place], modes.share[place])
    kept = (keys > 0.0) & (total > 1e-3 * total[-1])
    axes.semilogx(NM * keys[kept], total[kept], color=COLORS["wigner"])
    half = NM * keys[int(np.searchsorted(total, 0.5 * total[-1]))]
    axes.axvline(half, color="0.6", linewidth=0.8, linestyle="--")
    axes.annotate(
        f"half below {half:.3g} nm",
        (half, 0.94 * total[-1]),
        (-4, 0),
        textcoords="offset points",
        ha="right",
    )
    axes.set(xlabel="mean free path Λ, nm", ylabel="κ of paths below Λ, W/mK")
    axes.set_ylim(bottom=0.0)
