"""coset diagnose: how well a model keeps its promises for given structures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coset.ase_interface import Loaded, read_structures
from coset.cli.common import (
    CANNOT_WRITE,
    ChargeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    FilesArgument,
    ForceOption,
    GhostsOption,
    JsonOption,
    ModelOption,
    TargetOption,
    ThreadsOption,
    attempt,
    console,
    exit_code,
    label_of,
    open_session,
    record_of,
    result_table,
    short,
    tell,
    usable,
)
from coset.errors import ConfigError
from coset.workflows.equivariance import Equivariance, equivariance

MEV = 1e3


def diagnose(
    files: FilesArgument,
    model: ModelOption = None,
    only_equivariance: Annotated[
        bool, typer.Option("--equivariance", help="The anisotropy spectrum; also the default.")
    ] = False,
    max_degree: Annotated[
        int, typer.Option(min=1, max=12, help="Highest degree of the spectrum.")
    ] = 10,
    symprec: Annotated[float, typer.Option(help="Å, to find the group.")] = 1e-2,
    plot: Annotated[Path | None, typer.Option(help="Figure to write: png, svg or pdf.")] = None,
    target: TargetOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float64,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    drop_ghosts: GhostsOption = False,
    ignore_charge: ChargeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show how the energy turns with a structure, and what averaging would leave of it."""
    session = open_session(
        model,
        target=target,
        device=device,
        dtype=dtype,
        threads=threads,
        ignore_charge=ignore_charge,
    )
    if plot is not None and plot.exists() and not force:
        raise ConfigError(f"{plot} exists", code="FileExists", hint="--force overwrites it")
    loaded = read_structures(files, drop_ghosts=drop_ghosts)
    records = [record_of(one) for one in loaded]
    places, batch = usable(loaded)
    found: list[Equivariance] = []
    if batch is not None:
        found = equivariance(session.potential, batch, max_degree=max_degree, symprec=symprec)
    for place, one in zip(places, found, strict=True):
        records[place] |= _fields(one)
    _show(records, found, [loaded[place] for place in places])
    settings = {"max_degree": max_degree, "symprec_A": symprec}
    tell("diagnose", session, settings, records, as_json=as_json)
    good = [(one, label_of(records[k])) for k, one in zip(places, found, strict=True) if one.levels]
    if plot is not None and good and attempt(lambda: _plot(plot, good)):
        raise typer.Exit(CANNOT_WRITE)
    raise typer.Exit(exit_code(records))


def _fields(one: Equivariance) -> dict[str, Any]:
    """What the JSON record says."""
    record: dict[str, Any] = {"status": one.status, "code": one.code, "reason": one.reason}
    if (spectrum := one.spectrum) is None:
        return record
    return record | {
        "space_group": one.space_group,
        "point_group": one.point_group,
        "energy_eV": spectrum.mean,
        "rms_energy_per_atom_eV": spectrum.rms / one.n_atoms,
        "n_evaluations": spectrum.n_evaluations,
        "unexplained": spectrum.unexplained,
        "spectrum": [
            {
                "degree": sector.degree,
                "parity": sector.parity,
                "rms_energy_per_atom_eV": sector.power**0.5 / one.n_atoms,
            }
            for sector in spectrum.sectors
        ],
        "levels": [
            {
                "level": level.level,
                "n_evaluations": level.n_evaluations,
                "residual_per_atom_eV": level.residual / one.n_atoms,
            }
            for level in one.levels
        ],
    }


def _show(records: list[dict[str, Any]], found: list[Equivariance], loaded: list[Loaded]) -> None:
    """Rms of the energy over orientations, and what the levels leave, meV/atom (evaluations)."""
    good = [one for one in found if one.levels]
    if not good:
        return
    names = [level.level for level in good[0].levels if level.level != "none"]
    table = result_table("structure", "point group", "turning", "highest l", *names)
    for one, source in zip(found, loaded, strict=True):
        if one.spectrum is None:
            continue
        cells = [
            f"{short(MEV * level.residual / one.n_atoms)} ({level.n_evaluations})"
            for level in one.levels
            if level.level != "none"
        ]
        largest = max(one.spectrum.sectors, key=lambda sector: sector.power)
        table.add_row(
            Path(source.input).name,
            one.point_group,
            short(MEV * one.spectrum.rms / one.n_atoms),
            str(largest.degree),
            *cells,
        )
    console.print(table)
    console.print("rms of the energy over orientations, meV/atom; in brackets evaluations")


def _plot(path: Path, good: list[tuple[Equivariance, str]]) -> list[str]:
    from coset.analysis.plots import save_figure, spectrum_figure  # noqa: PLC0415  # slow to import

    save_figure(spectrum_figure([one for one, _ in good], [name for _, name in good]), path)
    return [str(path)]
