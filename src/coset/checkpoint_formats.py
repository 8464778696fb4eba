"""Formats of a model's manifest: the newest, and how to bring an older one up to it."""

from collections.abc import Callable

from coset.strict_json import Json, as_object

FORMAT = 2


def _reach_of_zbl(manifest: Json) -> Json:
    """Format 2 states how far the repulsion reaches, format 1 only whether there is one."""
    config = as_object(manifest.get("config"), "config")
    return {**manifest, "config": {**config, "zbl": float(bool(config.get("zbl")))}}


MIGRATIONS: dict[int, Callable[[Json], Json]] = {1: _reach_of_zbl}
"""`MIGRATIONS[n]` turns a manifest of format n into one of format n + 1."""
