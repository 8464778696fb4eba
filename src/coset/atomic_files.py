"""Writing files so that a reader, or the next run after a crash, sees the old content or the new.

Everything is written under a fresh name beside its final place, flushed to the disk and renamed.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Create or replace one file in a single step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path, "new")
    try:
        _write_synced(fresh, data)
        fresh.replace(path)
        _sync_directory(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Create or replace a directory that holds just `files`.

    A directory cannot be replaced in one step: for a moment the old one stands beside the new one
    under a hidden name, and it is put back if the new one cannot take its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _beside(path, "new"), _beside(path, "old")
    try:
        fresh.mkdir()
        for name, data in files.items():
            _write_synced(fresh / name, data)
        _sync_directory(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        _sync_directory(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(8)}")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
