"""coset eos: energy over volume and what follows from it."""

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from coset.ase_interface import Loaded, read_structures, write_structures
from coset.cli.common import (
    ChargeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FilesArgument,
    ForceOption,
    GhostsOption,
    JsonOption,
    ModelOption,
    Stopper,
    TargetOption,
    ThreadsOption,
    console,
    label_of,
    open_session,
    outcome_fields,
    progress,
    result_table,
    short,
)
from coset.cli.elastic import Projection
from coset.cli.evaluate import count_atoms
from coset.cli.folders import FolderCommand, FolderOption, Keep, PlotOption
from coset.structures import Structures, concatenate
from coset.workflows.eos import EosSettings, EquationOfState
from coset.workflows.eos import eos as equations_of_state
from coset.workflows.eos_fit import EosFit
from coset.workflows.quasi_harmonic import QuasiHarmonic, QuasiHarmonicSettings
from coset.workflows.quasi_harmonic import quasi_harmonic as expand

MEV = 1e3
ROOM = 300.0  # K


class Shape(StrEnum):
    """What the cell does at each volume."""

    shape = "shape"
    fixed = "fixed"


DEFAULT = EosSettings()
EXPANSION = QuasiHarmonicSettings()
EXPANSION_CODE = "NoThermalExpansion"
FILES = ("eos.png", "expansion.png", "volumes.extxyz")


def eos(
    files: FilesArgument,
    model: ModelOption = None,
    range_: Annotated[
        float, typer.Option("--range", help="Largest |V/V0 - 1|; 0.06 is six percent.")
    ] = DEFAULT.range,
    points: Annotated[int, typer.Option(help="Volumes.")] = DEFAULT.points,
    cell: Annotated[
        Shape, typer.Option(help="shape: relaxed at each volume; fixed: that of V0.")
    ] = Shape.shape,
    no_relax: Annotated[
        bool, typer.Option("--no-relax", help="The volume given is the center, not the minimum.")
    ] = False,
    symprec: Annotated[float, typer.Option(help="Å, to find the space group.")] = DEFAULT.symprec,
    average: Annotated[
        Projection, typer.Option(help="project: as the model is; above: rotations averaged.")
    ] = Projection.project,
    quasi_harmonic: Annotated[
        bool,
        typer.Option(
            "--quasi-harmonic",
            help="Phonons at volumes from V0 (1 - range/2) on: expansion up to --highest.",
        ),
    ] = False,
    highest: Annotated[
        float, typer.Option(min=1.0, help="K, with --quasi-harmonic.")
    ] = EXPANSION.highest,
    plot: PlotOption = False,
    target: TargetOption = None,
    output: FolderOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float64,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    drop_ghosts: GhostsOption = False,
    ignore_charge: ChargeOption = False,
) -> None:
    """Equation of state of crystals: all volumes of all crystals relax in one batch."""
    settings = EosSettings(
        range=range_,
        center=range_ / 2 if quasi_harmonic else 0.0,
        points=points,
        cell=cell.value,
        relax=not no_relax,
        symprec=symprec,
        average=average.value,
    )
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )
    said = settings_of(settings)
    thermal = None
    if quasi_harmonic:
        thermal = replace(EXPANSION, highest=highest, average=average.value)
        said |= {"highest_K": highest, "step_K": EXPANSION.step}
        said |= {"phonon_method": EXPANSION.method, "phonon_frames": EXPANSION.frames}

    def compute(structures: Structures, flag: Stopper, keep: Keep[_Curve]) -> None:
        with progress(len(structures) * points, "volumes") as update:
            watch = flag.watch(update)
            curves = equations_of_state(
                session.potential,
                structures,
                settings,
                observer=lambda now: watch(now.n_done, now.note),
            )
        for number, curve in enumerate(curves):
            keep(number, _Curve(curve))
        if thermal is None:
            return
        total = thermal.frames * sum(len(curve.points) for curve in curves)
        with progress(total, "phonons, volumes") as update:
            watch, done = flag.watch(update), 0
            for number, curve in enumerate(curves):

                def own(now: int, note: str, before: int = done) -> bool:
                    return watch(before + now, note)

                found = expand(session.potential, curve, thermal, observer=own)
                keep(number, _Curve(curve, found))
                done += thermal.frames * len(curve.points)

    command = FolderCommand(
        name="eos",
        settings=said,
        compute=compute,
        fields=fields_of,
        show=_show,
        write=partial(_write, plot=plot),
        files=FILES,
    )
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    raise typer.Exit(command.run(session, loaded, output, overwrite=force, as_json=as_json))


class _Curve(NamedTuple):
    eos: EquationOfState
    expansion: QuasiHarmonic | None = None


def settings_of(settings: EosSettings) -> dict[str, Any]:
    """Everything that can change a number."""
    relaxation = settings.relaxation("full")
    return {
        "range": settings.range,
        "center": settings.center,
        "points": settings.points,
        "cell": settings.cell,
        "relax": settings.relax,
        "symprec": settings.symprec,
        "average": settings.average,
        "force_tolerance": relaxation.force_tolerance,
        "stress_tolerance_GPa": relaxation.stress_tolerance_GPa,
    }


def fields_of(curve: _Curve, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure; the main fit is that of Birch and Murnaghan."""
    result = curve.eos
    fields: dict[str, Any] = outcome_fields(result, one)
    if (found := curve.expansion) is not None:
        fields |= {"quasi_harmonic": expansion_fields(found)}
        if found.status == "failed" and result.status == "ok":
            reason = f"no thermal expansion: {found.reason}"
            fields |= {"status": "not_converged", "code": EXPANSION_CODE, "reason": reason}
        elif found.reason and found.status == "ok":
            fields["warnings"].append("ThermalExpansionCut")
    if result.points:
        fields |= {
            "space_group": result.space_group,
            "curve": {
                "volume_A3": [point.volume for point in result.points],
                "energy_eV": [point.energy for point in result.points],
                "status": [point.status for point in result.points],
            },
        }
    if (fit := result.fit) is None or (other := result.vinet) is None:
        return fields
    return fields | {
        "volume_A3": fit.volume,
        "energy_eV": fit.energy,
        "energy_per_atom_eV": fit.energy / count_atoms(one),
        "bulk_modulus_GPa": fit.bulk_modulus_GPa,
        "bulk_modulus_derivative": fit.bulk_modulus_derivative,
        "volume_error_A3": abs(fit.volume - other.volume),
        "bulk_modulus_error_GPa": abs(fit.bulk_modulus_GPa - other.bulk_modulus_GPa),
        "bulk_modulus_derivative_error": abs(
            fit.bulk_modulus_derivative - other.bulk_modulus_derivative
        ),
        "birch_murnaghan": _fit_fields(fit),
        "vinet": _fit_fields(other),
    }


def expansion_fields(found: QuasiHarmonic) -> dict[str, Any]:
    """Thermal expansion of one crystal, per primitive cell."""
    fields: dict[str, Any] = {
        "status": found.status,
        "reason": found.reason,
        "left_out": [{"volume_A3": v, "reason": why} for v, why in found.left_out],
    }
    if found.temperature is None:
        return fields
    errors = found.errors
    return fields | {
        "temperature_K": found.temperature,
        "volume_A3": found.volume,
        "volume_error_A3": errors and errors.volume,
        "thermal_expansion_per_K": found.expansion,
        "thermal_expansion_error_per_K": errors and errors.expansion,
        "bulk_modulus_GPa": found.bulk_modulus_GPa,
        "bulk_modulus_error_GPa": errors and errors.bulk_modulus_GPa,
        "gibbs_energy_eV": found.gibbs,
        "gibbs_energy_error_eV": errors and errors.gibbs,
        "heat_capacity_p_eV_per_K": found.heat_capacity,
        "heat_capacity_p_error_eV_per_K": errors and errors.heat_capacity,
        "volumes_A3": list(found.volumes),
    }


def _fit_fields(fit: EosFit) -> dict[str, float]:
    return {
        "volume_A3": fit.volume,
        "energy_eV": fit.energy,
        "bulk_modulus_GPa": fit.bulk_modulus_GPa,
        "bulk_modulus_derivative": fit.bulk_modulus_derivative,
        "rms_energy_eV": fit.rms,
    }


def _write(folder: Path, one: Loaded, record: dict[str, Any], curve: _Curve, *, plot: bool) -> bool:
    """Structures at all volumes and figure."""
    result = curve.eos
    if not result.points:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    known = [point.structures for point in result.points if point.structures is not None]
    if known:
        originals = [one.atoms] * len(known) if one.atoms is not None else []
        path = folder / "volumes.extxyz"
        write_structures(path, concatenate(known), originals=originals, overwrite=True)
    if plot and result.fit is not None:
        from coset.analysis.elastic_plots import eos_figure, expansion_figure  # noqa: PLC0415  # slow
        from coset.analysis.plots import save_figure  # noqa: PLC0415

        figure = eos_figure(result, label_of(record), count_atoms(one))
        save_figure(figure, folder / "eos.png")
        if curve.expansion is not None and curve.expansion.status == "ok":
            figure = expansion_figure(curve.expansion, label_of(record))
            save_figure(figure, folder / "expansion.png")
    return True


def _show(records: list[dict[str, Any]]) -> None:
    table = result_table(
        "structure", "formula", "group", "eV/atom", "V0 Å³", "B GPa", "B'", "rms meV/atom"
    )
    done = [record for record in records if "bulk_modulus_GPa" in record]
    for record in done:
        table.add_row(
            label_of(record),
            record["formula"],
            str(record["space_group"] or "-"),
            f"{record['energy_per_atom_eV']:.5f}",
            f"{record['volume_A3']:.4f} ± {short(record['volume_error_A3'])}",
            f"{record['bulk_modulus_GPa']:.2f} ± {short(record['bulk_modulus_error_GPa'])}",
            f"{record['bulk_modulus_derivative']:.3f} "
            f"± {short(record['bulk_modulus_derivative_error'])}",
            short(MEV * record["birch_murnaghan"]["rms_energy_eV"] / record["n_atoms"]),
        )
    for record in records:
        if found := record.get("quasi_harmonic"):
            console.print(_expansion_line(label_of(record), found))
    if done:
        console.print(table)
        console.print("fit of Birch and Murnaghan; ± is its difference from that of Vinet")


def _expansion_line(label: str, found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return f"{label}: no thermal expansion: {found['reason']}"
    kelvin = found["temperature_K"]
    k = int(abs(kelvin - ROOM).argmin())
    cut = f"; up to {kelvin[-1]:.0f} K: {found['reason']}" if found["reason"] else ""
    return (
        f"{label}: at {kelvin[k]:.0f} K V {found['volume_A3'][k]:.4f} ± "
        f"{short(found['volume_error_A3'][k])} Å³ per primitive cell, "
        f"expansion {1e6 * found['thermal_expansion_per_K'][k]:.2f} ± "
        f"{short(1e6 * found['thermal_expansion_error_per_K'][k])} e-6 per K, "
        f"B {found['bulk_modulus_GPa'][k]:.2f} ± {short(found['bulk_modulus_error_GPa'][k])} GPa"
        f"{cut}"
    )
