"""coset relax: atoms and cell to their minimum, the space group kept."""

from dataclasses import asdict, replace
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

from coset.ase_interface import Loaded
from coset.cli.common import (
    INTERRUPTED,
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
    console,
    emit,
    exit_code,
    label_of,
    open_session,
    progress,
    read_inputs,
    record_of,
    report_problems,
    result_table,
    stopper,
    usable,
)
from coset.cli.evaluate import certificate_fields, count_atoms
from coset.cli.outputs import Outputs
from coset.workflows.relax import relax as relax_structures
from coset.workflows.relaxation import TIGHT, Progress, Relaxation, RelaxSettings


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
    max_steps: Annotated[int, typer.Option(min=0)] = DEFAULT.max_steps,
    cell: Annotated[
        CellMode | None, typer.Option(help="Default: full where periodic in 3D, else fixed.")
    ] = None,
    pressure: Annotated[float, typer.Option(help="GPa.")] = 0.0,
    tight: Annotated[bool, typer.Option("--tight", help="float64, 1e-4 eV/Å, 0.01 GPa.")] = False,
    optimizer: Annotated[Optimizer, typer.Option()] = Optimizer.lbfgs,
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
    )
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=Dtype.float64 if tight else dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )
    loaded = read_inputs(files, drop_ghosts=drop_ghosts)
    places, structures = usable(loaded)
    outputs = Outputs(output, [loaded[k] for k in places], structures, overwrite=force)
    fixed = torch.cat([f for k in places if (f := loaded[k].fixed) is not None])
    with stopper() as flag, progress(len(places), "relaxing") as update:

        def observer(now: Progress) -> bool:
            note = f"step {now.step}, {float(now.max_force.max()):.3g} eV/Å"
            update(now.n_done, note)
            if trajectory:
                outputs.append(now)
            return flag.stopped

        results = relax_structures(
            session.potential, structures, settings, fixed=fixed, observer=observer
        )
    written = outputs.write(results)
    records = [record_of(one) for one in loaded]
    for place, result in zip(places, results, strict=True):
        records[place] |= fields_of(result, loaded[place])
    if as_json:
        emit("relax", session, asdict(settings), records)
    else:
        _show(records)
    report_problems(records)
    console.print(f"wrote {', '.join(written)}" if written else "nothing to write", soft_wrap=True)
    raise typer.Exit(INTERRUPTED if flag.stopped else exit_code(records))


def fields_of(result: Relaxation, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure."""
    fields: dict[str, Any] = {
        "status": result.status,
        "code": result.code,
        "reason": result.reason,
        "warnings": [*one.warnings, *result.warnings],
    }
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
        "rmsd_A": result.rmsd,
        "certificate": certificate_fields(result.certificate),
    }


def _show(records: list[dict[str, Any]]) -> None:
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
            f"{record['max_force_eV_per_A']:.2g}",
            f"{record['max_stress_GPa']:.2g}",
            str(after or "-") if before == after else f"{before} → {after}",
            f"{record['rmsd_A']:.3f}",
        )
    console.print(table)
