"""Figures of elastic constants and equations of state."""

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from coset.workflows.elasticity.run import Constants
from coset.workflows.elasticity.tensor import young_modulus
from coset.workflows.eos import EquationOfState
from coset.workflows.quasi_harmonic import QuasiHarmonic

MEV = 1e3
COMPONENTS = ("xx", "yy", "zz", "yz", "xz", "xy")
PLANES = (("xy", (0, 1)), ("yz", (1, 2)), ("zx", (2, 0)))


def elastic_figure(constants: Constants, name: str) -> Figure:
    """Young's modulus over all directions, its cuts along three planes, and the tensor."""
    matrix, hill = constants.tensor_GPa, constants.moduli
    if float(constants.eigenvalues_GPa[0]) <= 0.0:
        figure = Figure(figsize=(5.0, 4.8), layout="constrained")
        figure.suptitle(f"{name}: not stable, no Young's modulus")
        _tensor(figure.add_subplot(), constants)
        return figure
    figure = Figure(figsize=(13.0, 4.6), layout="constrained")
    figure.suptitle(
        f"{name}: K = {hill.bulk_GPa:.2f} ± {constants.bulk_error_GPa:.2f} GPa, "
        f"G = {hill.shear_GPa:.2f} ± {constants.shear_error_GPa:.2f} GPa, "
        f"universal anisotropy {hill.anisotropy:.3f}"
    )
    _surface(figure.add_subplot(1, 3, 1, projection="3d"), matrix)
    _cuts(figure.add_subplot(1, 3, 2, projection="polar"), matrix)
    _tensor(figure.add_subplot(1, 3, 3), constants)
    return figure


def eos_figure(result: EquationOfState, name: str, n_atoms: int) -> Figure:
    """Energies and both fits, and below what the fits leave (meV/atom over Å³/atom)."""
    fit, other = result.fit, result.vinet
    assert fit is not None
    assert other is not None
    volumes, energies = (values.numpy() for values in result.curve)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    fine = np.linspace(volumes[0], volumes[-1], 200)
    for curve, label, style in (
        (fit, "Birch-Murnaghan", "-"),
        (other, "Vinet", "--"),
    ):
        text = f"{label}: B = {curve.bulk_modulus_GPa:.2f} GPa, B' = "
        text += f"{curve.bulk_modulus_derivative:.2f}, V0 = {curve.volume / n_atoms:.3f} Å³/atom"
        height = MEV * (curve.energies(fine) - fit.energy) / n_atoms
        upper.plot(fine / n_atoms, height, style, label=text)
        left = MEV * (energies - curve.energies(volumes)) / n_atoms
        lower.plot(volumes / n_atoms, left, f"o{style}", markersize=4)
    shown = MEV * (energies - fit.energy) / n_atoms
    upper.plot(volumes / n_atoms, shown, "ko", markersize=4, label="calculated")
    upper.set(ylabel="E - E0, meV/atom", title=name)
    upper.legend(fontsize="small")
    lower.axhline(0.0, color="0.6", linewidth=0.8)
    lower.set(xlabel="volume, Å³/atom", ylabel="residual, meV/atom")
    return figure


def expansion_figure(found: QuasiHarmonic, name: str) -> Figure:
    """Volume, thermal expansion and bulk modulus over temperature, with standard errors."""
    errors = found.errors
    figure = Figure(figsize=(6.4, 7.0), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    curves = (
        ("V, Å³/primitive cell", found.volume, errors and errors.volume, 1.0),
        ("expansion, 10⁻⁶/K", found.expansion, errors and errors.expansion, 1e6),
        ("B, GPa", found.bulk_modulus_GPa, errors and errors.bulk_modulus_GPa, 1.0),
    )
    for axes, (label, values, spread, unit) in zip(panels, curves, strict=True):
        assert values is not None
        axes.plot(found.temperature, unit * values)
        if spread is not None:
            low, high = unit * (values - spread), unit * (values + spread)
            axes.fill_between(found.temperature, low, high, alpha=0.3)
        axes.set(ylabel=label)
    panels[0].set_title(name)
    panels[-1].set(xlabel="T, K")
    return figure


def _surface(axes: Any, matrix: Tensor) -> None:  # noqa: ANN401  (three-dimensional, untyped)
    polar, azimuth = np.meshgrid(np.linspace(0, np.pi, 61), np.linspace(0, 2 * np.pi, 121))
    directions = np.stack(
        [np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], axis=-1
    )
    values = young_modulus(matrix, torch.from_numpy(directions)).numpy()
    x, y, z = np.moveaxis(values[..., None] * directions, -1, 0)
    low, high = float(values.min()), float(values.max())
    shade = (values - low) / max(high - low, 1e-9 * high)
    axes.plot_surface(
        x, y, z, facecolors=colormaps["viridis"](shade), rstride=1, cstride=1, shade=False
    )
    limit = 1.05 * high
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), zlim=(-limit, limit))
    axes.set(xlabel="x", ylabel="y", zlabel="z")
    axes.set_title(f"Young's modulus, {low:.1f} to {high:.1f} GPa", fontsize="medium")
    axes.set_box_aspect((1, 1, 1))
    axes.tick_params(labelsize="x-small")


def _cuts(axes: Axes, matrix: Tensor) -> None:
    angle = np.linspace(0, 2 * np.pi, 361)
    for (label, (first, second)), width in zip(PLANES, (4.5, 2.5, 1.0), strict=True):
        directions = np.zeros((len(angle), 3))
        directions[:, first], directions[:, second] = np.cos(angle), np.sin(angle)
        text = f"{label} plane, from {label[0]}"
        modulus = young_modulus(matrix, torch.from_numpy(directions))
        axes.plot(angle, modulus.numpy(), linewidth=width, label=text)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    for tick in axes.get_yticklabels():  # curves run through them
        tick.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0})
    axes.set_title("Young's modulus, GPa", fontsize="medium")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.28), fontsize="small", ncols=3)


def _tensor(axes: Axes, constants: Constants) -> None:
    values, errors = constants.tensor_GPa.numpy(), constants.error_GPa.numpy()
    limit = float(np.abs(values).max())
    axes.imshow(values, cmap="RdBu_r", vmin=-1.6 * limit, vmax=1.6 * limit)
    for row, column in np.ndindex(6, 6):
        value, error = values[row, column], errors[row, column]
        if abs(value) > 1e-6 * limit:
            text = f"{value:.1f}\n±{error:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize="x-small")
    axes.set_xticks(range(6), COMPONENTS)
    axes.set_yticks(range(6), COMPONENTS)
    axes.set_title(f"C, GPa, ions {constants.ions}", fontsize="medium")
