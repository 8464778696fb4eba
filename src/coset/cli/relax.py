"""coset relax: atoms and cell to their minimum, the space group kept."""

import time
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

from coset.ase_interface import Loaded, read_structures
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
    OutputOption,
    TargetOption,
    ThreadsOption,
    attempt,
    console,
    exit_code,
    label_of,
    open_session,
    outcome_fields,
    progress,
    record_of,
    result_table,
    short,
    stopper,
    tell,
    usable,
)
from coset.cli.evaluate import (
    DEFAULT_TOLERANCE,
    MEV,
    Average,
    ToleranceOption,
    certificate_fields,
    count_atoms,
)
from coset.cli.outputs import Outputs
from coset.workflows.relax import relax as relax_structures
from coset.workflows.relaxation import TIGHT, Progress, Relaxation, RelaxSettings
from coset.workflows.stability import Stability


class Symmetry(StrEnum):
    """Whether the space group is kept."""

    keep = "keep"
    free = "free"


class CellMode(StrEnum):
    """Which strains relax."""

    full = "full"
    fixed = "fixed"
    shape = "shape"
    volume = "volume"


class Optimizer(StrEnum):
    """How."""

    lbfgs = "lbfgs"
    fire = "fire"


DEFAULT = RelaxSettings()


def relax(
    files: FilesArgument,
    model: ModelOption = None,
    symmetry: Annotated[
        Symmetry, typer.Option(help="keep: symmetrize to the space group and stay in it.")
    ] = Symmetry.keep,
    symprec: Annotated[float, typer.Option(help="Å, to find the space group.")] = DEFAULT.symprec,
    fmax: Annotated[
        float | None, typer.Option(help=f"eV/Å, longest force; default {DEFAULT.force_tolerance}.")
    ] = None,
    smax: Annotated[
        float | None,
        typer.Option(help=f"GPa, largest stress; default {DEFAULT.stress_tolerance_GPa}."),
    ] = None,
    max_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the optimizer.")
    ] = DEFAULT.max_steps,
    cell: Annotated[
        CellMode | None,
        typer.Option(
            help="full; shape (volume kept); volume (shape kept); fixed. Default: full where "
            "periodic in 3D, else fixed."
        ),
    ] = None,
    pressure: Annotated[
        float, typer.Option(help="External pressure in GPa; positive compresses.")
    ] = 0.0,
    average: Annotated[
        Average | None,
        typer.Option(help="Rotations averaged; default: project with keep, none with free."),
    ] = None,
    rotational_tolerance: ToleranceOption = DEFAULT_TOLERANCE,
    tight: Annotated[bool, typer.Option("--tight", help="float64, 1e-4 eV/Å, 0.01 GPa.")] = False,
    check_stability: Annotated[
        bool,
        typer.Option(
            "--check-stability", help="Look for displacements at Γ that lower the symmetry."
        ),
    ] = False,
    optimizer: Annotated[
        Optimizer, typer.Option(help="lbfgs needs fewer evaluations.")
    ] = Optimizer.lbfgs,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Write every step to STEM-trajectory.extxyz.")
    ] = False,
    target: TargetOption = None,
    output: OutputOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.mixed,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    drop_ghosts: GhostsOption = False,
    ignore_charge: ChargeOption = False,
) -> None:
    """Relax many structures at once, atoms and cell; each gets a status and a reason."""
    base = TIGHT if tight else DEFAULT
    settings = replace(
        base,
        force_tolerance=base.force_tolerance if fmax is None else fmax,
        stress_tolerance_GPa=base.stress_tolerance_GPa if smax is None else smax,
        max_steps=max_steps,
        cell=None if cell is None else cell.value,
        pressure_GPa=pressure,
        symmetry=symmetry.value,
        symprec=symprec,
        optimizer=optimizer.value,
        average=None if average is None else average.value,
        rotational_tolerance=MEV * rotational_tolerance,
        check_stability=check_stability,
    )
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=Dtype.float64 if tight else dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    records = [record_of(one) for one in loaded]
    places, structures = usable(loaded)
    if structures is None:
        tell("relax", session, asdict(settings), records, as_json=as_json)
        raise typer.Exit(exit_code(records))
    used = [loaded[k] for k in places]
    outputs = Outputs(output, used, structures, trajectory=trajectory, overwrite=force)
    fixed = torch.cat([f for one in used if (f := one.fixed) is not None])
    start = time.perf_counter()
    with stopper() as flag, progress(len(places), "relaxing") as update:
        watch = flag.watch(update)

        def observer(now: Progress) -> bool:
            if trajectory:
                outputs.append(now)
            return watch(now.n_done, now.note)

        results = relax_structures(
            session.potential, structures, settings, fixed=fixed, observer=observer
        )
    seconds = time.perf_counter() - start
    for place, result in zip(places, results, strict=True):
        records[place] |= fields_of(result, loaded[place])
    if not as_json:
        _show(records, seconds)
    tell("relax", session, asdict(settings), records, as_json=as_json)
    code = attempt(lambda: outputs.write(results))
    raise typer.Exit(code or flag.code or exit_code(records))


def fields_of(result: Relaxation, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure."""
    fields: dict[str, Any] = outcome_fields(result, one)
    if result.status == "rejected" or result.properties is None:
        return fields
    return fields | {
        "energy_eV": result.energy,
        "energy_per_atom_eV": result.energy / count_atoms(one),
        "n_steps": result.n_steps,
        "n_evaluations": result.n_evaluations,
        "max_force_eV_per_A": result.max_force,
        "max_stress_GPa": result.max_stress_GPa,
        "pressure_GPa": result.pressure_GPa,
        "space_group_before": result.space_group_before,
        "space_group_after": result.space_group_after,
        "group_kept": result.group_kept,
        "rmsd_A": result.rmsd,
        "certificate": certificate_fields(result.certificate),
        "stability": _stability_fields(result.stability),
    }


def _group(before: int | None, after: int | None, kept: str) -> str:
    """Numbers of the space groups; for slabs and molecules what was kept."""
    if before is None and after is None:
        return kept
    return str(after) if before == after else f"{before} → {after}"


def _stability_fields(found: Stability | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "verdict": found.verdict,
        "curvature_eV_per_A2": found.curvature,
        "curvature_error_eV_per_A2": found.error,
        "mode": None if found.mode is None else found.mode.tolist(),
    }


def _show(records: list[dict[str, Any]], seconds: float) -> None:
    table = result_table(
        "structure", "formula", "status", "eV/atom", "steps", "eV/Å", "GPa", "group", "rmsd Å"
    )
    for record in records:
        if "energy_eV" not in record:
            continue
        before, after = record["space_group_before"], record["space_group_after"]
        table.add_row(
            label_of(record),
            record["formula"],
            record["status"],
            f"{record['energy_per_atom_eV']:.5f}",
            str(record["n_steps"]),
            short(record["max_force_eV_per_A"]),
            short(record["max_stress_GPa"]),
            _group(before, after, record["group_kept"]),
            f"{record['rmsd_A']:.3f}",
        )
    console.print(table)
    for record in records:
        if found := record.get("stability"):
            value, error = found["curvature_eV_per_A2"], found["curvature_error_eV_per_A2"]
            console.print(
                f"{label_of(record)}: {found['verdict']} at Γ, lowest curvature that breaks the "
                f"symmetry {value:.3g} ± {error:.1g} eV/Å²"
            )
    converged = sum(record["status"] == "converged" for record in records)
    evaluations = sum(record.get("n_evaluations", 0) for record in records)
    console.print(
        f"{converged} of {len(records)} converged, {evaluations} evaluations, {seconds:.1f} s"
    )
