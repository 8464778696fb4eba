"""coset phonons: bands with error bars, DOS, thermal properties, a verdict."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
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
from coset.cli.folders import BornOption, FolderCommand, FolderOption, Keep, PlotOption
from coset.cli.words import born_of, mesh_of, path_of, temperatures_of
from coset.structures import Structures
from coset.workflows.phonons.by_phonopy import FILES as LATTICE_FILES
from coset.workflows.phonons.descent import Instability, Minimum
from coset.workflows.phonons.results import PhononResult, Phonons, PhononSettings
from coset.workflows.phonons.run import phonons as phonons_of
from coset.workflows.phonons.verdict import Verdict
from coset.workflows.relaxation import TIGHT


class Method(StrEnum):
    """Where force constants come from."""

    exact = "exact"
    displacements = "displacements"


class Average(StrEnum):
    """Rotations of one frame."""

    none = "none"
    project = "project"
    light = "light"
    standard = "standard"
    tight = "tight"
    reference = "reference"


DEFAULT = PhononSettings()
FILES = ("phonons.png", "primitive.vasp", *LATTICE_FILES, "minimum-*.vasp")


def phonons(
    files: FilesArgument,
    model: ModelOption = None,
    method: Annotated[
        Method, typer.Option(help="exact: derivatives of the model; displacements: differences.")
    ] = Method.exact,
    supercell: Annotated[
        str | None,
        typer.Option(
            help="Primitive cells that force constants reach, as 4x4x4; default: enlarged until "
            "interpolated frequencies are right."
        ),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help=f"Mesh of DOS and verdict, as 20x20x20; default: {DEFAULT.spacing} 1/Å."),
    ] = None,
    path: Annotated[
        str, typer.Option(help="auto: the standard one; or its points, as 'G-X-U|K-G-L'.")
    ] = "auto",
    symprec: Annotated[float, typer.Option(help="Å, to find the space group.")] = DEFAULT.symprec,
    average: Annotated[
        Average, typer.Option(help="project: single frames; above: rotations averaged.")
    ] = Average.project,
    frames: Annotated[
        int, typer.Option(min=1, help="Independent frames, whose scatter gives the errors.")
    ] = DEFAULT.frames,
    temperatures: Annotated[
        str, typer.Option(help="K: 300, a list as 100,300, or a range as 0:1000:100.")
    ] = "0:1000:100",
    born: BornOption = None,
    no_relax: Annotated[
        bool, typer.Option("--no-relax", help="Keep the structure given, whatever its forces.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="From an unstable crystal down to its minima.")
    ] = False,
    double: Annotated[
        bool, typer.Option("--double", help="All exact derivatives as precise as --dtype.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewest exact derivatives: faster, larger errors."),
    ] = False,
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
    """Phonons of crystals, relaxed first: frequencies with error bars, and a verdict."""
    settings = PhononSettings(
        method=method.value,
        supercell=mesh_of(supercell, "supercell"),
        mesh=mesh_of(mesh, "mesh"),
        path=path_of(path),
        relax=not no_relax,
        symprec=symprec,
        average=average.value,
        frames=frames,
        temperatures=temperatures_of(temperatures),
        born=born_of(born),
        follow=follow,
        double=double,
        quick=quick,
    )
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )

    def compute(structures: Structures, flag: Stopper, keep: Keep[Phonons]) -> None:
        with progress(len(structures), "phonons") as update:
            watch = flag.watch(update)
            phonons_of(session.potential, structures, settings, observer=watch, on_result=keep)

    command = FolderCommand(
        name="phonons",
        settings=settings_of(settings) | {"path": path},
        compute=compute,
        fields=fields_of,
        show=partial(_show, follow=follow),
        write=partial(_write, plot=plot),
        files=FILES,
    )
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    raise typer.Exit(command.run(session, loaded, output, overwrite=force, as_json=as_json))


def settings_of(settings: PhononSettings) -> dict[str, Any]:
    """Everything that can change a number."""
    return {
        "method": settings.method,
        "supercell": settings.supercell,
        "mesh": settings.mesh,
        "min_edge_A": settings.min_edge,
        "max_edge_A": settings.max_edge,
        "relax": settings.relax,
        "force_tolerance": TIGHT.force_tolerance if settings.relax else None,
        "stress_tolerance_GPa": TIGHT.stress_tolerance_GPa if settings.relax else None,
        "symprec_A": settings.symprec,
        "average": settings.average,
        "frames": settings.frames,
        "seed": settings.seed,
        "interpolation_tolerance_THz": settings.interpolation_tolerance_THz,
        "amplitude_A": settings.amplitude,
        "spacing_per_A": settings.spacing,
        "temperature_K": settings.temperatures,
        "born": settings.born,
        "follow": settings.follow,
        "double": settings.double,
        "quick": settings.quick,
    }


def fields_of(result: Phonons, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure."""
    fields: dict[str, Any] = outcome_fields(result, one)
    if (found := result.result) is None:
        return fields
    energy = found.energy / len(found.primitive.atomic_numbers)
    return fields | {
        "energy_eV": energy * count_atoms(one),
        "energy_per_atom_eV": energy,
        "space_group": found.space_group,
        "supercell": found.supercell,
        "mesh": found.mesh,
        "interpolation_error_THz": found.interpolation_error_THz,
        "gamma_residual_THz": found.gamma_residual_THz,
        **_spectrum_fields(found),
        **_verdict_fields(found.verdict),
        "instabilities": [_instability_fields(one) for one in found.instabilities],
        "minima": [_minimum_fields(one) for one in found.minima],
    }


def _spectrum_fields(found: PhononResult) -> dict[str, Any]:
    bands, thermal = found.bands, found.thermal
    return {
        "primitive_cell_A": found.primitive.cell[0],
        "primitive_positions_A": found.primitive.positions,
        "primitive_atomic_numbers": found.primitive.atomic_numbers,
        "q_points": bands.path.q_points,
        "path_distance_per_A": bands.path.distances,
        "path_segments": bands.path.segments,
        "path_labels": bands.path.labels,
        "frequency_THz": bands.frequency_THz,
        "frequency_error_THz": bands.error_THz,
        "dos_frequency_THz": found.dos.frequency_THz,
        "dos_states_per_THz": found.dos.states,
        "temperature_K": thermal.temperatures,
        "free_energy_eV": thermal.free_energy,
        "free_energy_error_eV": thermal.free_energy_error,
        "entropy_eV_per_K": thermal.entropy,
        "entropy_error_eV_per_K": thermal.entropy_error,
        "heat_capacity_eV_per_K": thermal.heat_capacity,
        "heat_capacity_error_eV_per_K": thermal.heat_capacity_error,
        "imaginary_share": thermal.imaginary_share,
    }


def _verdict_fields(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.kind,
        "verdict_reason": verdict.reason,
        "verdict_settled_by": verdict.settle,
        "decisive_mode": {
            "q_point": verdict.q,
            "branch": verdict.branch,
            "frequency_THz": verdict.frequency_THz,
            "frequency_error_THz": verdict.error_THz,
            "threshold_THz": verdict.threshold_THz,
            "amplitude_A": verdict.amplitude,
            "energy_drop_eV": verdict.drop,
            "energy_drop_error_eV": verdict.drop_error,
        },
    }


def _instability_fields(one: Instability) -> dict[str, Any]:
    return {
        "q_point": one.q,
        "frequency_THz": one.frequency_THz,
        "frequency_error_THz": one.error_THz,
        "n_modes": one.n_modes,
        "outcomes": one.outcomes,
    }


def _minimum_fields(one: Minimum) -> dict[str, Any]:
    return {
        "parent": one.parent,
        "q_point": one.q,
        "space_group": one.space_group,
        "n_atoms": len(one.structures.atomic_numbers),
        "energy_drop_per_atom_eV": one.drop,
        "energy_drop_error_per_atom_eV": one.drop_error,
        "accepted": one.accepted,
        "verdict_at_gamma": one.verdict,
        "reason": one.reason,
    }


def _write(
    folder: Path, one: Loaded, record: dict[str, Any], result: Phonons, *, plot: bool
) -> bool:
    """Primitive cell, files of phonopy and figure."""
    if (found := result.result) is None:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_structures(folder / "primitive.vasp", found.primitive, format="vasp", overwrite=True)
    found.lattice.write(folder)
    for number, minimum in enumerate(found.minima):
        path = folder / f"minimum-{number}.vasp"
        write_structures(path, minimum.structures, format="vasp", overwrite=True)
    if plot:
        from coset.analysis.phonon_plots import phonon_figure  # noqa: PLC0415  # slow to import
        from coset.analysis.plots import save_figure  # noqa: PLC0415

        save_figure(phonon_figure(found, label_of(record)), folder / "phonons.png")
    return True


def _show(records: list[dict[str, Any]], *, follow: bool) -> None:
    """One row per crystal, why where the verdict is not plain, and what was followed."""
    done = [record for record in records if "verdict" in record]
    if not done:
        return
    table = result_table(
        "structure",
        "formula",
        "group",
        "supercell",
        "lowest THz",
        "highest THz",
        "F300 eV",
        "verdict",
    )
    for record in done:
        frequencies = record["frequency_THz"]
        table.add_row(
            label_of(record),
            record["formula"],
            str(record["space_group"] or "-"),
            "x".join(str(n) for n in record["supercell"]),
            f"{frequencies.min():.3f}",
            _with_error(frequencies, record["frequency_error_THz"], int(frequencies.argmax())),
            _at_300(record),
            record["verdict"],
        )
    console.print(table)
    for record in done:
        if (error := record["interpolation_error_THz"]) is not None:
            console.print(f"{label_of(record)}: interpolation error {error:.3f} THz")
        if record["verdict"] != "stable":
            console.print(_because(record))
        if follow and record["verdict"] != "unstable":
            console.print(f"{label_of(record)}: nothing to follow, it is {record['verdict']}")
        for one in record["instabilities"]:
            console.print(_softest(one), soft_wrap=True)
        for number, one in enumerate(record["minima"]):
            console.print(_below(number, one), soft_wrap=True)


def _with_error(values: np.ndarray, errors: np.ndarray | None, place: int) -> str:
    text = f"{values.flat[place]:.3f}"
    return text if errors is None else f"{text} ± {errors.flat[place]:.3f}"


def _at_300(record: dict[str, Any]) -> str:
    near = np.flatnonzero(record["temperature_K"] == 300.0)
    return f"{record['free_energy_eV'][near[0]]:.4f}" if len(near) else "-"


def _softest(one: dict[str, Any]) -> str:
    """One line for the modes of a wave vector."""
    q = " ".join(f"{x:.4g}" for x in one["q_point"])
    return (
        f"unstable at q = {q}: {one['frequency_THz']:.3f} ± {one['frequency_error_THz']:.3f} THz, "
        f"{one['n_modes']} modes; {'; '.join(one['outcomes'])}"
    )


def _below(number: int, one: dict[str, Any]) -> str:
    """One line for a minimum."""
    drop, error = (1e3 * one[f"energy_drop{kind}_per_atom_eV"] for kind in ("", "_error"))
    above = "the crystal" if one["parent"] < 0 else f"minimum {one['parent']}"
    word = "" if one["accepted"] else ", within its error"
    return (
        f"minimum {number} below {above}: group {one['space_group']}, {one['n_atoms']} atoms, "
        f"{drop:.3f} ± {error:.3f} meV/atom lower{word}; at Gamma {one['verdict_at_gamma'] or '-'}"
    )


def _because(record: dict[str, Any]) -> str:
    mode = record["decisive_mode"]
    q = " ".join(f"{x:.4g}" for x in mode["q_point"])
    text = (
        f"{label_of(record)} {record['verdict']}: {record['verdict_reason']}; mode "
        f"{mode['branch'] + 1} at q = {q}, {mode['frequency_THz']:.3f} ± "
        f"{mode['frequency_error_THz']:.3f} THz"
    )
    settle = record["verdict_settled_by"]
    return f"{text}; settled by {settle}" if settle else text
