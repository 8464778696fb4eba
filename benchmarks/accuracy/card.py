"""Every number of a model card, for one of our models or for a published one.

Usage:
    python card.py --data FOLDER --model PATH_OR_NAME --out RESULTS.json [--part errors ...]
    python card.py --data FOLDER --peer chgnet|sevennet --out RESULTS.json
    python card.py --table RESULTS.json [MORE.json ...]

FOLDER holds the reference data (see `model_card/reference.py`). Results are saved after every part;
parts that are there already are skipped unless `--redo`. Published potentials run one structure
after the other and are measured on fixed random parts of the long sets, unless `--all-frames`; the
same parts are reported for ours. `--table` prints Markdown.
"""

import argparse
import json
import math
import platform
import sys
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from model_card import bulk, checks, diatomics, eos, errors, lattice, speed, tables
from model_card.subjects import PUBLISHED, Progress, Subject, our_model

PARTS = {
    "errors": errors.measure,
    "eos": eos.measure,
    "lattice": lattice.measure,
    "bulk": bulk.measure,
    "diatomics": diatomics.measure,
    "checks": checks.measure,
    "speed": speed.measure,
}


def main():
    """Measure, or print the tables of what was measured."""
    options = arguments()
    if options.table:
        print(tables.markdown([json.loads(path.read_text()) for path in options.table]))
        return
    warnings.simplefilter("ignore")
    subject = PUBLISHED[options.peer]() if options.peer else our_model(options.model)
    if options.all_frames:
        subject = replace(subject, shortened=False)
    results = begun(options.out, subject)
    for name in options.part or PARTS:
        if name in results["parts"] and not options.redo:
            continue
        torch.set_num_threads(options.threads)
        start = time.perf_counter()
        found = PARTS[name](subject, options.data, reporter(name))
        seconds = round(time.perf_counter() - start)
        results["parts"][name] = tidy(found)
        results["runs"][name] = {
            "seconds": seconds,
            "threads": options.threads,
            "machine": platform.machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        save(results, options.out)
        print(f"\r{name}: done in {seconds} s    ", file=sys.stderr)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the reference data")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", help="a model of ours: directory, file or catalog name")
    who.add_argument("--peer", choices=PUBLISHED)
    who.add_argument("--table", type=Path, nargs="+", help="files of results to print")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--out", type=Path, help="file of results, added to")
    parser.add_argument("--redo", action="store_true", help="measure parts again")
    parser.add_argument("--all-frames", action="store_true", help="long sets in full for peers too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.table and not (options.data and options.out):
        parser.error("--data and --out are needed to measure")
    return options


def begun(path: Path, subject: Subject) -> dict[str, Any]:
    """What the file of results holds already; it must be of the same potential."""
    if not path.exists():
        return subject.facts() | {"runs": {}, "parts": {}}
    results = json.loads(path.read_text())
    found = {key: results[key] for key in ("name", "sha256")}
    if found != {"name": subject.name, "sha256": subject.sha256}:
        sys.exit(f"{path} has results of {found}, not of {subject.name} {subject.sha256}")
    return results


def reporter(part: str) -> Progress:
    """Progress on standard error."""

    def report(done: int, total: int) -> None:
        print(f"\r{part}: {done}/{total}      ", end="", file=sys.stderr, flush=True)

    return report


def tidy(value: Any) -> Any:
    """The same with five digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: tidy(one) for key, one in value.items()}
    if isinstance(value, list):
        return [tidy(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def save(results: dict[str, Any], path: Path) -> None:
    """One line for each part, so that changes can be read; whole or not at all."""
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in results if key != "parts"]
    parts = [f"{json.dumps(key)}: {json.dumps(one)}" for key, one in results["parts"].items()]
    lines.append('"parts": {\n' + ",\n".join(parts) + "\n}")
    unfinished = path.with_suffix(".part")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
