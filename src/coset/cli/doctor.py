"""coset doctor: is the installation sound, and is a data file what it seems?"""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from coset.ase_interface import read_structures
from coset.ase_interface.labels import labels_of
from coset.cli.common import JsonOption, console, print_json
from coset.diagnostics import force_consistency, inspect_installation, suspicious_lengths


def doctor(
    files: Annotated[list[str] | None, typer.Argument(help="Data files to look into.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, test that forces are gradients, look for wrong units and signs."""
    installation = inspect_installation()
    findings = look_into(files or [])
    if as_json:
        print_json(asdict(installation) | {"sound": installation.sound, "findings": findings})
    else:
        _show(asdict(installation), findings)
    raise typer.Exit(0 if installation.sound and not findings else 1)


def look_into(files: list[str]) -> list[dict[str, Any]]:
    """Everything suspicious in the files: unreadable frames, odd lengths, forces of wrong sign."""
    findings: list[dict[str, Any]] = []
    by_file: dict[str, list[Any]] = {}
    for one in read_structures(files):
        place = {"input": one.input, "index": one.index}
        if one.error is not None or one.structures is None:
            code = one.error.code if one.error else ""
            findings.append(place | {"code": code, "reason": str(one.error)})
            continue
        by_file.setdefault(one.input, []).append(one)
        if reason := suspicious_lengths(one.structures):
            findings.append(place | {"code": "UnitsSuspicious", "reason": reason})
    for name, loaded in by_file.items():
        frames = [one.structures for one in loaded]
        found = force_consistency(frames, [labels_of(one.atoms) for one in loaded])
        console.print(f"{name}: {len(loaded)} frames; {_labels_text(found)}", soft_wrap=True)
        if found is None:
            continue
        correlation, slope, _ = found
        place = {"input": name, "index": 0}
        if correlation < -0.5:
            reason = f"energy changes against the forces (correlation {correlation:.2f})"
            findings.append(place | {"code": "SignSuspicious", "reason": reason})
        elif correlation > 0.9 and not 0.7 < slope < 1.4:
            reason = f"energy changes by {slope:.3g} times what the forces say: check the units"
            findings.append(place | {"code": "UnitsSuspicious", "reason": reason})
    return findings


def _labels_text(found: tuple[float, float, int] | None) -> str:
    if found is None:
        return "forces not testable (fewer than five consecutive frames of the same atoms and cell)"
    correlation, slope, steps = found
    return f"dE against -F.dx over {steps} steps: correlation {correlation:.2f}, slope {slope:.2f}"


def _show(installation: dict[str, Any], findings: list[dict[str, Any]]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, found in installation.pop("packages").items():
        table.add_row(name, found or "not installed")
    for key, value in installation.items():
        table.add_row(key.replace("_", " "), f"{value:.1e}" if key == "force_error" else f"{value}")
    console.print(table)
    for finding in findings:
        where = f"{finding['input']}[{finding['index']}]"
        text = f"{where} {finding['code']}: {finding['reason']}"
        console.print(text, style="yellow", soft_wrap=True)
