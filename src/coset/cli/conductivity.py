"""coset conductivity: lattice thermal conductivity."""

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
from coset.cli.elastic import Projection
from coset.cli.folders import BornOption, FolderCommand, FolderOption, Keep, PlotOption
from coset.cli.words import born_of, mesh_of, temperatures_of
from coset.structures import Structures
from coset.workflows.conductivity.by_phono3py import FILES as FORCE_CONSTANT_FILES
from coset.workflows.conductivity.by_phono3py import require_phono3py
from coset.workflows.conductivity.results import (
    Conductivity,
    ConductivityResult,
    ConductivitySettings,
)
from coset.workflows.conductivity.run import conductivity as conductivities

DEFAULT = ConductivitySettings()
FILES = ("conductivity.png", "primitive.vasp", *FORCE_CONSTANT_FILES)


class Transport(StrEnum):
    """What is solved."""

    rta = "rta"
    lbte = "lbte"
    wigner = "wigner"


class Derivatives(StrEnum):
    """Where force constants come from."""

    displacements = "displacements"
    exact = "exact"


def conductivity(
    files: FilesArgument,
    model: ModelOption = None,
    method: Annotated[
        Transport,
        typer.Option(help="Relaxation times; the full Boltzmann equation; with coherences."),
    ] = Transport.wigner,
    temperatures: Annotated[
        str, typer.Option(help="K: 300, or 100,300, or 100:1000:100 (first:last:step).")
    ] = "300",
    mesh: Annotated[
        str | None, typer.Option(help="Of the primitive cell: 19x19x19; default: by distance.")
    ] = None,
    supercell: Annotated[
        str | None, typer.Option(help="Third order: 2x2x2 of the cell given; default: by edges.")
    ] = None,
    supercell_fc2: Annotated[
        str | None, typer.Option("--supercell-fc2", help="Second order, likewise.")
    ] = None,
    derivatives: Annotated[
        Derivatives, typer.Option(help="Forces of displaced supercells, or exact Hessians.")
    ] = Derivatives.displacements,
    amplitude: Annotated[float, typer.Option(help="Å, of displacements.")] = DEFAULT.amplitude,
    no_isotopes: Annotated[
        bool, typer.Option("--no-isotopes", help="Isotopes scatter nothing.")
    ] = False,
    boundary: Annotated[
        float | None, typer.Option(help="Micrometers between walls that scatter.")
    ] = None,
    born: BornOption = None,
    allow_imaginary: Annotated[
        bool, typer.Option("--allow-imaginary", help="Conductivity in spite of imaginary modes.")
    ] = False,
    no_relax: Annotated[bool, typer.Option("--no-relax", help="Keep the structure given.")] = False,
    symprec: Annotated[float, typer.Option(help="Å, to find the space group.")] = DEFAULT.symprec,
    average: Annotated[
        Projection, typer.Option(help="project: single frames; above: rotations averaged.")
    ] = Projection.project,
    frames: Annotated[
        int, typer.Option(min=1, help="Independent frames; their scatter is the error.")
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
    """Lattice thermal conductivity of crystals by phono3py, relaxed first."""
    settings = ConductivitySettings(
        method=method.value,
        derivatives=derivatives.value,
        temperatures=temperatures_of(temperatures),
        supercell=mesh_of(supercell, "supercell"),
        supercell_fc2=mesh_of(supercell_fc2, "supercell_fc2"),
        mesh=mesh_of(mesh, "mesh"),
        relaxation=None if no_relax else DEFAULT.relaxation,
        symprec=symprec,
        average=average.value,
        frames=frames,
        amplitude=amplitude,
        isotopes=not no_isotopes,
        boundary_um=boundary,
        allow_imaginary=allow_imaginary,
        born=born_of(born),
    )
    require_phono3py()
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )

    def compute(structures: Structures, flag: Stopper, keep: Keep[Conductivity]) -> None:
        with progress(len(structures), "conductivity") as update:
            watch = flag.watch(update)
            conductivities(session.potential, structures, settings, observer=watch, on_result=keep)

    command = FolderCommand(
        name="conductivity",
        settings=settings_of(settings),
        compute=compute,
        fields=fields_of,
        show=_show,
        write=partial(_write, plot=plot),
        files=FILES,
    )
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    raise typer.Exit(command.run(session, loaded, output, overwrite=force, as_json=as_json))


def settings_of(settings: ConductivitySettings) -> dict[str, Any]:
    """Everything that can change a number."""
    relaxation = settings.tight()
    return {
        "method": settings.method,
        "derivatives": settings.derivatives,
        "temperature_K": settings.temperatures,
        "supercell": settings.supercell,
        "supercell_fc2": settings.supercell_fc2,
        "mesh": settings.mesh,
        "min_edge_A": settings.min_edge,
        "min_edge_fc2_A": settings.min_edge_fc2,
        "spacing_per_A": settings.spacing,
        "relax": relaxation is not None,
        "force_tolerance": None if relaxation is None else relaxation.force_tolerance,
        "symprec": settings.symprec,
        "average": settings.average,
        "frames": settings.frames,
        "amplitude_A": settings.amplitude,
        "isotopes": settings.isotopes,
        "boundary_um": settings.boundary_um,
        "allow_imaginary": settings.allow_imaginary,
        "born": settings.born,
    }


def fields_of(result: Conductivity, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure."""
    fields: dict[str, Any] = outcome_fields(result, one)
    if (found := result.result) is None:
        return fields
    fields |= {
        "space_group": found.space_group,
        "primitive_cell_A": found.primitive.cell[0],
        "supercell": found.supercell,
        "supercell_fc2": found.supercell_fc2,
        "mesh": found.mesh,
        "lowest_frequency_THz": found.lowest_THz,
        "n_imaginary": found.n_imaginary,
        "n_evaluations": found.n_evaluations,
        "residual_fc3_eV_per_A3": found.residual_fc3,
    }
    return fields if found.kappa is None else fields | kappa_fields(found)


def kappa_fields(found: ConductivityResult) -> dict[str, Any]:
    """Conductivity and modes; all kappa are temperatures x 3 x 3, in the axes of the input."""
    assert found.kappa is not None
    modes = found.kappa.modes
    return {
        "temperature_K": found.kappa.temperatures,
        "kappa_W_per_mK": found.value,
        "kappa_error_W_per_mK": found.error,
        "rotational_noise_share": found.noise_share,
        "kappa_rta_W_per_mK": found.kappa.rta,
        "kappa_coherences_W_per_mK": found.kappa.coherences,
        "kappa_lbte_W_per_mK": found.kappa.lbte,
        "modes": {
            "q_points": modes.q_points,
            "weights": modes.weights,
            "frequency_THz": modes.frequency_THz,
            "linewidth_THz": modes.linewidth_THz,
            "mean_free_path_A": modes.mean_free_path,
            "kappa_share_W_per_mK": modes.share,
        },
    }


def _write(
    folder: Path, one: Loaded, record: dict[str, Any], result: Conductivity, *, plot: bool
) -> bool:
    """Primitive cell, files of phono3py and figure."""
    if (found := result.result) is None:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_structures(folder / "primitive.vasp", found.primitive, format="vasp", overwrite=True)
    found.anharmonic.write(folder)
    if plot and found.kappa is not None:
        from coset.analysis.conductivity_plots import (  # noqa: PLC0415  # slow to import
            conductivity_figure,
        )
        from coset.analysis.plots import save_figure  # noqa: PLC0415

        save_figure(conductivity_figure(found, label_of(record)), folder / "conductivity.png")
    return True


def _show(records: list[dict[str, Any]]) -> None:
    """One row per crystal and temperature; the trace over three where axes differ."""
    done = [record for record in records if "kappa_W_per_mK" in record]
    columns = ("structure", "formula", "group", "mesh", "T K", "κ W/mK", "κxx", "κyy", "κzz")
    table = result_table(*columns)
    for record in done:
        errors = record["kappa_error_W_per_mK"]
        for row, kappa in enumerate(record["kappa_W_per_mK"]):
            mean = kappa.trace() / 3.0
            error = "" if errors is None else f" ± {errors[row].trace() / 3.0:.2g}"
            table.add_row(
                label_of(record),
                record["formula"],
                str(record["space_group"] or "-"),
                "x".join(str(n) for n in record["mesh"]),
                f"{record['temperature_K'][row]:g}",
                f"{mean:.4g}{error}",
                *(f"{kappa[k, k]:.4g}" for k in range(3)),
            )
    if done:
        console.print(table)
