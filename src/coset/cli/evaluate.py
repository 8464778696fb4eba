"""coset evaluate: energies, forces and stress."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

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
    tell,
    usable,
)
from coset.cli.outputs import check_single_output
from coset.structures import concatenate, join_properties
from coset.symmetry.adaptive import TOLERANCE
from coset.symmetry.certificate import Certificate
from coset.units import GPA_PER_EV_PER_A3
from coset.workflows.evaluate import Evaluation
from coset.workflows.evaluate import evaluate as evaluate_structures


class Forces(StrEnum):
    """Where forces come from."""

    conservative = "conservative"
    direct = "direct"


class Average(StrEnum):
    """What is done about symmetry."""

    none = "none"
    project = "project"
    light = "light"
    standard = "standard"
    tight = "tight"
    reference = "reference"
    auto = "auto"


ToleranceOption = Annotated[
    float,
    typer.Option("--rotational-tolerance", help="meV/atom, for --average auto.", min=0.0),
]
DEFAULT_TOLERANCE = 1e3 * TOLERANCE
MEV = 1e-3


def evaluate(
    files: FilesArgument,
    model: ModelOption = None,
    target: TargetOption = None,
    forces: Annotated[Forces, typer.Option(help="Gradient or direct heads.")] = Forces.conservative,
    average: Annotated[
        Average,
        typer.Option(help="project: on the group of the structure; above: rotations averaged."),
    ] = Average.none,
    rotational_tolerance: ToleranceOption = DEFAULT_TOLERANCE,
    symprec: Annotated[float, typer.Option(help="Å, to find the space group.")] = 1e-2,
    output: OutputOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.mixed,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    drop_ghosts: GhostsOption = False,
    ignore_charge: ChargeOption = False,
) -> None:
    """Energy, forces and stress of structures, as the model gives them."""
    if output is not None:
        check_single_output(Path(output), overwrite=force)
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        forces=forces,
        ignore_charge=ignore_charge,
    )
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    records = [record_of(one) for one in loaded]
    settings: dict[str, Any] = {
        "average": average,
        "symprec": symprec,
        "rotational_tolerance": MEV * rotational_tolerance,
    }
    places, structures = usable(loaded)
    if structures is None:
        tell("evaluate", session, settings, records, as_json=as_json)
        raise typer.Exit(exit_code(records))
    with progress(len(places), "evaluating") as update:
        results = evaluate_structures(
            session.potential, structures, **settings, observer=lambda done: update(done, "")
        )
    for place, result in zip(places, results, strict=True):
        records[place] |= fields_of(result, loaded[place])
    if not as_json:
        _show(records)
    tell("evaluate", session, settings, records, as_json=as_json)
    code = 0
    if output is not None:
        by_place = dict(zip(places, results, strict=True))
        code = attempt(lambda: _write(output, loaded, by_place, overwrite=force))
    raise typer.Exit(code or exit_code(records))


def fields_of(result: Evaluation, one: Loaded) -> dict[str, Any]:
    """The result fields of one structure."""
    own = result.properties
    fields: dict[str, Any] = outcome_fields(result, one)
    if own is None or own.energy is None:
        return fields
    forces = own.forces if own.forces is not None else own.direct_forces
    stress = own.stress if own.stress is not None else own.direct_stress
    if stress is not None and bool(stress.isnan().any()):
        stress = None
    energy = float(own.energy[0])
    return fields | {
        "energy_eV": energy,
        "energy_per_atom_eV": energy / count_atoms(one),
        "forces_eV_per_A": forces,
        "stress_eV_per_A3": None if stress is None else stress[0],
        "atomic_energies_eV": own.atomic_energies,
        "space_group": result.space_group,
        "certificate": certificate_fields(result.certificate),
    }


def count_atoms(one: Loaded) -> int:
    """Atoms of an accepted frame."""
    assert one.structures is not None
    return len(one.structures.atomic_numbers)


def certificate_fields(certificate: Certificate | None) -> dict[str, Any] | None:
    """The certificate as JSON."""
    if certificate is None:
        return None
    return {
        "torque_eV": certificate.torque,
        "force_deviation_eV_per_A": certificate.force_deviation,
        "stress_deviation_GPa": certificate.stress_deviation_GPa,
        "rotational_error": None
        if (error := certificate.rotational_error) is None
        else {
            "energy_eV": error.energy,
            "forces_eV_per_A": error.forces,
            "stress_GPa": error.stress_GPa,
        },
    }


def _write(
    output: str, loaded: list[Loaded], results: dict[int, Evaluation], *, overwrite: bool
) -> list[str]:
    """All evaluated frames with their properties in one extended XYZ file; its name."""
    done = [
        (loaded[place], structures, properties)
        for place, result in results.items()
        if (structures := loaded[place].structures) and (properties := result.properties)
    ]
    if not done:
        return []
    write_structures(
        Path(output),
        concatenate([structures for _, structures, _ in done]),
        properties=join_properties([properties for _, _, properties in done]),
        originals=[atoms for one, _, _ in done if (atoms := one.atoms) is not None],
        overwrite=overwrite,
    )
    return [output]


def _stress(stress: Tensor | None) -> str:
    return "-" if stress is None else f"{float(stress.abs().max()) * GPA_PER_EV_PER_A3:.3f}"


def _torque(certificate: dict[str, Any] | None) -> str:
    if certificate is None or certificate["torque_eV"] is None:
        return "-"
    return f"{abs(certificate['torque_eV']).max():.1e}"


def _show(records: list[dict[str, Any]]) -> None:
    table = result_table(
        "structure", "formula", "eV", "eV/atom", "force eV/Å", "stress GPa", "torque eV", "group"
    )
    for record in records:
        if record["status"] != "ok":
            continue
        table.add_row(
            label_of(record),
            record["formula"],
            f"{record['energy_eV']:.6f}",
            f"{record['energy_per_atom_eV']:.6f}",
            f"{float(record['forces_eV_per_A'].norm(dim=1).max()):.4f}",
            _stress(record["stress_eV_per_A3"]),
            _torque(record["certificate"]),
            str(record["space_group"] or "-"),
        )
    console.print(table)
