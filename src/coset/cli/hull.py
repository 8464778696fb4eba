"""coset hull: formation energies, energies above a convex hull, and how sure they are."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from coset.ase_interface import Loaded, read_structures, write_structures
from coset.ase_interface.references import References, entry_of, read_references
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
    Session,
    TargetOption,
    ThreadsOption,
    attempt,
    console,
    exit_code,
    label_of,
    open_session,
    progress,
    record_of,
    result_table,
    stopper,
    tell,
    usable,
)
from coset.cli.elastic import Projection
from coset.cli.folders import FolderOption, result_folders, write_record
from coset.errors import StructureError
from coset.workflows.convex_hull import HullEntry
from coset.workflows.hull import MIN_FRAMES, HullDistance, HullSettings, energies
from coset.workflows.hull import hull as distances_to_hull
from coset.workflows.relaxation import Observer, Progress

DEFAULT = HullSettings()
MEV = 1e3


def hull(
    files: FilesArgument,
    references: Annotated[
        str,
        typer.Option(help="Compounds and elements with energies: a JSON list, or frames."),
    ],
    model: ModelOption = None,
    model_references: Annotated[
        bool,
        typer.Option("--model-references", help="Energies of the references from the model too."),
    ] = False,
    any_level: Annotated[
        bool, typer.Option("--any-level", help="Take references of any level of theory.")
    ] = False,
    corrections: Annotated[
        bool, typer.Option("--corrections", help="Add the corrections that entries carry.")
    ] = False,
    compete: Annotated[
        bool, typer.Option("--compete", help="Put the structures on the hull too.")
    ] = False,
    no_relax: Annotated[bool, typer.Option("--no-relax", help="Structures stay as given.")] = False,
    fmax: Annotated[float, typer.Option(help="eV/Å, of the relaxation.")] = DEFAULT.force_tolerance,
    symprec: Annotated[float, typer.Option(help="Å, to find the group.")] = DEFAULT.symprec,
    average: Annotated[
        Projection, typer.Option(help="project: single frames; above: rotations averaged.")
    ] = Projection.project,
    frames: Annotated[
        int, typer.Option(min=MIN_FRAMES, help="Independent frames; their scatter is the error.")
    ] = DEFAULT.frames,
    target: TargetOption = None,
    output: FolderOption = None,
    force: ForceOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.mixed,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    drop_ghosts: GhostsOption = False,
    ignore_charge: ChargeOption = False,
) -> None:
    """Energy above the convex hull of given references, with decomposition and P(stable)."""
    settings = HullSettings(
        relax=not no_relax,
        force_tolerance=fmax,
        symprec=symprec,
        average=average.value,
        frames=frames,
        corrections=corrections,
        compete=compete,
        any_level=any_level or model_references,
    )
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )
    known = read_references(references)
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    records = [record_of(one) for one in loaded]
    places, structures = usable(loaded)
    folders = result_folders(output, [loaded[k] for k in places], "hull", overwrite=force)
    said = asdict(settings) | {"references": references, "model_references": model_references}
    if structures is None:
        tell("hull", session, said, records, as_json=as_json)
        raise typer.Exit(exit_code(records))
    own = [entry_of(loaded[k]) for k in places]
    with stopper() as flag, progress(len(places), "hull") as update:
        watch = flag.watch(update)

        def observer(now: Progress) -> bool:
            return watch(now.n_done, now.note)

        others = _entries(known, session, settings, observer, computed=model_references)
        results = distances_to_hull(
            session.potential, structures, others, settings, entries=own, observer=observer
        )
    for place, result in zip(places, results, strict=True):
        records[place] |= fields_of(result, loaded[place], corrected=corrections)
    if not as_json:
        _show(records)
    tell("hull", session, said, records, as_json=as_json)
    done = [
        (folder, loaded[place], records[place], result)
        for folder, place, result in zip(folders, places, results, strict=True)
        if result.distance is not None
    ]
    code = attempt(lambda: [_write(*one) for one in done])
    raise typer.Exit(code or flag.code or exit_code(records))


def fields_of(result: HullDistance, one: Loaded, *, corrected: bool) -> dict[str, Any]:
    """The result fields of one structure."""
    missing = corrected and (one.atoms is None or "correction" not in one.atoms.info)
    notes = ["NoCorrection"] if missing else []
    fields: dict[str, Any] = {
        "status": result.status,
        "code": result.code,
        "reason": result.reason,
        "warnings": [*one.warnings, *result.warnings, *notes],
    }
    if (entry := result.entry) is None:
        return fields
    fields |= {
        "energy_eV": entry.energy,
        "energy_per_atom_eV": entry.energy / entry.n_atoms,
        "energy_error_eV": entry.error,
    }
    if (found := result.distance) is None:
        return fields
    return fields | {
        "formation_energy_per_atom_eV": found.formation_energy,
        "energy_above_hull_per_atom_eV": found.above_hull,
        "energy_above_hull_error_per_atom_eV": found.error,
        "stable_probability": found.stable_probability,
        "decomposition": [{"name": p.name, "atom_share": p.share} for p in found.decomposition],
    }


def _entries(
    known: References,
    session: Session,
    settings: HullSettings,
    observer: Observer,
    *,
    computed: bool,
) -> list[HullEntry]:
    """The references with energies: those of the file, or of the model.

    Raises:
        StructureError: "BadReference", one of them has none.
    """
    if not computed:
        for one in known.entries:
            if one.energy != one.energy:
                raise _unusable(one.name, "has no energy; --model-references computes it")
        return list(known.entries)
    places, structures = usable(known.loaded)
    if structures is None:
        raise _unusable("file", "holds no structures whose energies could be computed")
    found = energies(
        session.potential,
        structures,
        settings,
        entries=[known.entries[k] for k in places],
        observer=observer,
    )
    entries = []
    for place, result in zip(places, found, strict=True):
        name = known.entries[place].name
        said = f"{result.status} ({result.code}): {result.reason}"
        if result.entry is None:
            raise _unusable(name, said)
        if result.status != "ok":
            console.print(f"reference {name} {said}", style="yellow", soft_wrap=True)
        entries.append(result.entry)
    return entries


def _unusable(name: str, reason: str) -> StructureError:
    return StructureError(f"reference {name} {reason}", code="BadReference", field="references")


def _write(folder: Path, one: Loaded, record: dict[str, Any], result: HullDistance) -> str:
    """Record and final structure; the name of the folder."""
    assert result.structures is not None
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "hull.json", record)
    write_structures(
        folder / "relaxed.extxyz",
        result.structures,
        originals=[] if one.atoms is None else [one.atoms],
        overwrite=True,
    )
    return str(folder)


def _show(records: list[dict[str, Any]]) -> None:
    """One row per structure."""
    done = [record for record in records if "stable_probability" in record]
    table = result_table(
        "structure", "formula", "formation eV/atom", "above hull meV/atom", "P(stable)", "phases"
    )
    for record in done:
        above = MEV * record["energy_above_hull_per_atom_eV"]
        error = MEV * record["energy_above_hull_error_per_atom_eV"]
        phases = [f"{p['atom_share']:.3g} {p['name']}" for p in record["decomposition"]]
        table.add_row(
            label_of(record),
            record["formula"],
            f"{record['formation_energy_per_atom_eV']:.4f}",
            f"{above:.2f} ± {error:.2f}",
            f"{record['stable_probability']:.3f}",
            " + ".join(phases),
        )
    if done:
        console.print(table)
