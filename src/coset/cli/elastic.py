"""coset elastic: elastic constants with errors."""

import math
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

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
)
from coset.cli.evaluate import count_atoms
from coset.cli.folders import FolderCommand, FolderOption, Keep, PlotOption
from coset.structures import Structures
from coset.workflows.elasticity.run import MIN_FRAMES, Constants, Elasticity, ElasticSettings
from coset.workflows.elasticity.run import elastic as elastic_constants


class Ions(StrEnum):
    """What ions do under strain."""

    relaxed = "relaxed"
    clamped = "clamped"


class Projection(StrEnum):
    """What is averaged; all project on the group."""

    project = "project"
    light = "light"
    standard = "standard"
    tight = "tight"
    reference = "reference"


DEFAULT = ElasticSettings()
FILES = ("elastic.png", "relaxed.extxyz")


def elastic(
    files: FilesArgument,
    model: ModelOption = None,
    ions: Annotated[
        Ions, typer.Option(help="relaxed: to their minimum under each strain; clamped: not.")
    ] = Ions.relaxed,
    no_relax: Annotated[
        bool, typer.Option("--no-relax", help="Keep the cell given, whatever its stress.")
    ] = False,
    pressure: Annotated[
        float, typer.Option(help="External pressure in GPa; positive compresses.")
    ] = 0.0,
    symprec: Annotated[float, typer.Option(help="Å, to find the space group.")] = DEFAULT.symprec,
    average: Annotated[
        Projection, typer.Option(help="project: single frames; above: rotations averaged.")
    ] = Projection.project,
    frames: Annotated[
        int,
        typer.Option(min=MIN_FRAMES, help="Independent frames; their scatter is the error."),
    ] = DEFAULT.frames,
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
    """Elastic constants, moduli and Born stability of crystals, relaxed first."""
    settings = ElasticSettings(
        ions=ions.value,
        relax=not no_relax,
        pressure_GPa=pressure,
        symprec=symprec,
        average=average.value,
        frames=frames,
    )
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )

    def compute(structures: Structures, flag: Stopper, keep: Keep[Elasticity]) -> None:
        with progress(len(structures), "elastic") as update:
            watch, potential = flag.watch(update), session.potential
            elastic_constants(potential, structures, settings, observer=watch, on_result=keep)

    command = FolderCommand(
        name="elastic",
        settings=settings_of(settings),
        compute=compute,
        fields=fields_of,
        show=_show,
        write=partial(_write, plot=plot),
        files=FILES,
    )
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    raise typer.Exit(command.run(session, loaded, output, overwrite=force, as_json=as_json))


def settings_of(settings: ElasticSettings) -> dict[str, Any]:
    """Everything that can change a number."""
    relaxation = settings.relaxation()
    return {
        "ions": settings.ions,
        "relax": settings.relax,
        "pressure_GPa": settings.pressure_GPa,
        "symprec": settings.symprec,
        "average": settings.average,
        "frames": settings.frames,
        "force_tolerance": relaxation.force_tolerance,
        "stress_tolerance_GPa": relaxation.stress_tolerance_GPa,
    }


def fields_of(result: Elasticity, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure."""
    fields: dict[str, Any] = outcome_fields(result, one)
    if (own := result.constants) is None or result.structures is None:
        return fields
    return fields | {
        "energy_eV": result.energy,
        "energy_per_atom_eV": result.energy / count_atoms(one),
        "volume_A3": float(result.structures.volume[0]),
        "space_group": result.space_group,
        **constant_fields(own),
    }


def constant_fields(own: Constants) -> dict[str, Any]:
    """Elastic constants as JSON; Voigt's notation xx yy zz yz xz xy."""
    return {
        "ions": own.ions,
        "measure": own.measure,
        "elastic_tensor_GPa": own.tensor_GPa,
        "elastic_tensor_error_GPa": own.error_GPa,
        "clamped_tensor_GPa": own.clamped_GPa,
        "eigenvalues_GPa": own.eigenvalues_GPa,
        "eigenvalue_errors_GPa": own.eigenvalue_errors_GPa,
        "born_stable": own.born_stable,
        "bulk_modulus_GPa": own.moduli.bulk_GPa,
        "bulk_modulus_error_GPa": own.bulk_error_GPa,
        "shear_modulus_GPa": own.moduli.shear_GPa,
        "shear_modulus_error_GPa": own.shear_error_GPa,
        "young_modulus_GPa": own.moduli.young_GPa,
        "poisson_ratio": own.moduli.poisson,
        "universal_anisotropy": own.moduli.anisotropy,
        "bulk_modulus_voigt_GPa": own.moduli.bulk_voigt_GPa,
        "bulk_modulus_reuss_GPa": own.moduli.bulk_reuss_GPa,
        "shear_modulus_voigt_GPa": own.moduli.shear_voigt_GPa,
        "shear_modulus_reuss_GPa": own.moduli.shear_reuss_GPa,
        "symmetry_violation_GPa": own.symmetry_violation_GPa,
        "stress_GPa": own.stress_GPa,
        "softest_mode_eV_per_A2": own.softest_mode,
        "n_frames": own.n_frames,
    }


def _write(
    folder: Path, one: Loaded, record: dict[str, Any], result: Elasticity, *, plot: bool
) -> bool:
    """Final structure and figure."""
    if result.structures is None or result.constants is None:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_structures(
        folder / "relaxed.extxyz",
        result.structures,
        originals=[] if one.atoms is None else [one.atoms],
        overwrite=True,
    )
    if plot and not result.constants.tensor_GPa.isnan().any():
        from coset.analysis.elastic_plots import elastic_figure  # noqa: PLC0415  # slow to import
        from coset.analysis.plots import save_figure  # noqa: PLC0415

        save_figure(elastic_figure(result.constants, label_of(record)), folder / "elastic.png")
    return True


def _show(records: list[dict[str, Any]]) -> None:
    """One row per crystal, and the tensor with its errors where there are few."""
    done = [record for record in records if "elastic_tensor_GPa" in record]
    table = result_table(
        "structure", "formula", "group", "ions", "K GPa", "G GPa", "E", "ν", "Born"
    )
    for record in done:
        stable = {True: "stable", False: "unstable", None: "undecided"}[record["born_stable"]]
        table.add_row(
            label_of(record),
            record["formula"],
            str(record["space_group"] or "-"),
            record["ions"],
            _number(record["bulk_modulus_GPa"], record["bulk_modulus_error_GPa"]),
            _number(record["shear_modulus_GPa"], record["shear_modulus_error_GPa"]),
            _number(record["young_modulus_GPa"]),
            _number(record["poisson_ratio"], digits=3),
            stable,
        )
    if done:
        console.print(table)
    for record in done[:3]:
        console.print(f"{label_of(record)}: C in GPa, xx yy zz yz xz xy, in the axes of the input")
        rows = zip(record["elastic_tensor_GPa"], record["elastic_tensor_error_GPa"], strict=True)
        for values, errors in rows:
            cells = zip(values.tolist(), errors.tolist(), strict=True)
            console.print("  ".join(f"{round(v, 2) + 0.0:9.2f}({e:.2f})" for v, e in cells))


def _number(value: float, error: float | None = None, digits: int = 2) -> str:
    if math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:.{digits}f}"
