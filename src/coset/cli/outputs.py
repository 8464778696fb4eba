"""Where relaxed structures and trajectories are written."""

from collections.abc import Sequence
from pathlib import Path

import torch

from coset.ase_interface import Loaded, result_file, write_structures
from coset.ase_interface.labels import append_frame
from coset.structures import Structures, concatenate, join_properties, properties_of, select
from coset.workflows.relaxation import Progress, Relaxation


class Outputs:
    """Where results go: one file for all, or one per input file beside each other."""

    def __init__(
        self,
        output: str | None,
        loaded: Sequence[Loaded],
        structures: Structures,
        *,
        overwrite: bool,
    ) -> None:
        """Choose the names, and refuse to overwrite before anything is computed."""
        self.loaded, self.overwrite = loaded, overwrite
        target = None if output is None else Path(output)
        single = target is not None and bool(target.suffix) and not target.is_dir()
        self.folder = Path() if target is None else (target.parent if single else target)
        self.groups: dict[Path, list[int]] = {}
        self.formats: dict[Path, str] = {}
        by_file: dict[str, list[int]] = {}
        for place, one in enumerate(loaded):
            by_file.setdefault(one.input, []).append(place)
        if single and target is not None:
            self.groups[target] = list(range(len(loaded)))
            self.formats[target] = "extxyz"
        else:
            for source, places in by_file.items():
                self._add(source, places, structures)
        for path in self.groups:
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path} exists already; --force overwrites it")
        self.trajectories: set[Path] = set()

    def _add(self, source: str, places: list[int], structures: Structures) -> None:
        batch = select(structures, torch.tensor(places))
        name, form = result_file(source, self.loaded[places[0]].format, batch)
        path, number = self.folder / name, 2
        while path in self.groups:
            stem, suffix = Path(name).stem, Path(name).suffix
            path, number = self.folder / f"{stem}-{number}{suffix}", number + 1
        self.groups[path], self.formats[path] = places, form

    def append(self, now: Progress) -> None:
        """Add the current geometry of every active structure to its trajectory."""
        for place, number in enumerate(now.systems):
            one = self.loaded[number]
            stem = "stdin" if one.input == "-" else Path(one.input).stem
            index = f"-{one.index}" if one.index else ""
            path = self.folder / f"{stem}{index}-trajectory.extxyz"
            fresh = path not in self.trajectories
            self.trajectories.add(path)
            append_frame(
                path,
                select(now.structures, torch.tensor([place])),
                properties_of(now.properties, now.structures, place),
                fresh=fresh,
            )

    def write(self, results: Sequence[Relaxation]) -> list[str]:
        """Write every geometry there is, in input order; the input where it was rejected."""
        written = []
        for path, places in self.groups.items():
            kept = [k for k in places if self._final(k, results) is not None]
            frames = [s for k in kept if (s := self._final(k, results)) is not None]
            if not frames:
                continue
            known = [results[k].properties for k in kept]
            complete = [p for p in known if p is not None]
            write_structures(
                path,
                concatenate(frames),
                format=self.formats[path],
                properties=join_properties(complete) if len(complete) == len(known) else None,
                originals=[a for k in kept if (a := self.loaded[k].atoms) is not None],
                overwrite=self.overwrite,
            )
            written.append(str(path))
        return [*written, *sorted(str(path) for path in self.trajectories)]

    def _final(self, place: int, results: Sequence[Relaxation]) -> Structures | None:
        return results[place].structures or self.loaded[place].structures
