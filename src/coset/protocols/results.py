"""The folder of a benchmark: a manifest and one record per material, resumable at any time."""

import json
from dataclasses import asdict
from pathlib import Path

from coset.atomic_files import write_file
from coset.errors import CheckpointError, ConfigError
from coset.protocols.manifest import Manifest, differences
from coset.protocols.records import Row
from coset.strict_json import as_dataclass, parse_json

MANIFEST, RECORDS = "manifest.json", "records"
SHOWN = 4


def begin(folder: Path, manifest: Manifest) -> dict[str, Row]:
    """The records that are there by key, after the manifest was written or found to be the same.

    Raises:
        ConfigError: "OtherManifest", the folder holds results of something else; "DamagedRecord".
    """
    path = folder / MANIFEST
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} is not empty and holds no benchmark",
                code="OtherManifest",
                field="output",
            )
        document = {"sha256": manifest.sha256} | manifest.document()
        write_file(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        return {}
    _check(path, manifest)
    rows = [_read(one) for one in sorted((folder / RECORDS).glob("*.json"))]
    return {row.key: row for row in rows}


def save(folder: Path, row: Row) -> None:
    """Write one record, whole or not at all."""
    text = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)
    write_file(folder / RECORDS / f"{row.key}.json", (text + "\n").encode())


def _check(path: Path, manifest: Manifest) -> None:
    there = _parsed(path)
    there.pop("sha256", None)
    if changed := differences(there, manifest.document()):
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            f"{path.parent} holds results of another run: {'; '.join(changed[:SHOWN])}{more}",
            code="OtherManifest",
            field="output",
            hint="give another folder with -o, or the settings of that run",
        )


def _read(path: Path) -> Row:
    try:
        return as_dataclass(Row, _parsed(path), path.name)
    except CheckpointError as error:
        raise _damaged(path, error) from error


def _parsed(path: Path) -> dict[str, object]:
    try:
        return parse_json(path.read_bytes(), path.name)
    except CheckpointError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: CheckpointError) -> ConfigError:
    return ConfigError(
        f"{path}: {error}", code="DamagedRecord", field="output", hint="delete it and run again"
    )
