"""The materials of a benchmark one after the other, going on where it stopped."""

from collections.abc import Callable, Sequence
from pathlib import Path

from coset.potential import Potential
from coset.protocols.manifest import Manifest
from coset.protocols.records import Benchmark, Entry, Row, measured
from coset.protocols.results import begin, save

Observer = Callable[[int, Row | None], bool]
"""Told how many are done and the last record of this run; returns True to stop."""


def run_benchmark(
    benchmark: Benchmark,
    potential: Potential,
    manifest: Manifest,
    entries: Sequence[Entry],
    folder: Path,
    *,
    observer: Observer | None = None,
) -> tuple[Row, ...]:
    """The records of all entries, or of some if stopped, in their order.

    What has no record yet is computed, and saved as soon as it is done.

    Raises:
        ConfigError: the folder holds something else.
    """
    records = begin(folder, manifest)
    done = {one.key: records[one.key] for one in entries if one.key in records}
    last: Row | None = None
    for entry in entries:
        if entry.key in done:
            continue
        if observer is not None and observer(len(done), last):
            break
        last = measured(benchmark, potential, entry)
        save(folder, last)
        done[entry.key] = last
    return tuple(done[one.key] for one in entries if one.key in done)
