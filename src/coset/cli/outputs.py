"""Where relaxed structures and trajectories are written."""

from collections.abc import Container, Sequence
from pathlib import Path

import torch

from coset.ase_interface import Loaded, result_file, write_structures
from coset.ase_interface.labels import append_frame
from coset.errors import ConfigError
from coset.structures import (
    Properties,
    Structures,
    concatenate,
    join_properties,
    properties_of,
    select,
)
from coset.workflows.relaxation import Progress, Relaxation

ONE_FILE = (".extxyz", ".xyz")


class Outputs:
    """Where results go: one extended XYZ file for all inputs, or one file per input file."""

    def __init__(
        self,
        output: str | None,
        loaded: Sequence[Loaded],
        structures: Structures,
        *,
        trajectory: bool,
        overwrite: bool,
    ) -> None:
        """Choose all names, and refuse to overwrite before anything is computed.

        loaded, structures: the usable frames and their batch.
        """
        self.loaded, self.overwrite = loaded, overwrite
        target = None if output is None else Path(output)
        self.single = (
            target is not None
            and bool(target.suffix)
            and not target.is_dir()
            and not str(output).endswith("/")
        )
        self.groups: dict[Path, tuple[list[int], str]] = {}
        self.trajectories: dict[int, Path] = {}
        self.folder = Path() if target is None else (target.parent if self.single else target)
        if self.single and target is not None:
            self._use_one_file(target)
        else:
            self._use_folder(structures)
        if trajectory:
            self._name_trajectories()
        for path in (*self.groups, *self.trajectories.values()):
            _refuse_existing(path, overwrite=overwrite)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _use_one_file(self, target: Path) -> None:
        check_single_output(target, overwrite=self.overwrite)
        self.groups[target] = list(range(len(self.loaded))), "extxyz"

    def _use_folder(self, structures: Structures) -> None:
        by_file: dict[str, list[int]] = {}
        for place, one in enumerate(self.loaded):
            by_file.setdefault(one.input, []).append(place)
        for source, places in by_file.items():
            batch = select(structures, torch.tensor(places))
            name, form = result_file(source, self.loaded[places[0]].format, batch)
            self.groups[_free(self.folder / name, self.groups)] = places, form

    def _name_trajectories(self) -> None:
        for place, one in enumerate(self.loaded):
            stem = "stdin" if one.input == "-" else Path(one.input).stem
            index = f"-{one.index}" if one.index else ""
            path = self.folder / f"{stem}{index}-trajectory.extxyz"
            self.trajectories[place] = _free(path, set(self.trajectories.values()))

    def append(self, now: Progress) -> None:
        """Add the current geometry of every active structure to its trajectory."""
        for place, number in enumerate(now.systems):
            append_frame(
                self.trajectories[number],
                select(now.structures, torch.tensor([place])),
                properties_of(now.properties, now.structures, place),
                fresh=now.step == 0,
            )

    def write(self, results: Sequence[Relaxation]) -> list[str]:
        """Write every geometry there is, in input order; returns the names of the files.

        In the one file for all, a structure that was rejected stands as it came, so that frames
        and inputs correspond; each frame tells its input and status.
        """
        written = []
        for path, (places, form) in self.groups.items():
            kept = [k for k in places if self.single or results[k].structures is not None]
            if not kept or all(results[k].structures is None for k in kept):
                continue
            frames = [self._final(results[k], k) for k in kept]
            write_structures(
                path,
                concatenate(frames),
                format=form,
                properties=join_properties(
                    [
                        _known(results[k].properties, one)
                        for k, one in zip(kept, frames, strict=True)
                    ]
                ),
                originals=[a for k in kept if (a := self.loaded[k].atoms) is not None],
                info=[self._identity(k, results[k]) for k in kept],
                overwrite=self.overwrite,
            )
            written.append(str(path))
        return [*written, *(str(path) for path in self.trajectories.values() if path.exists())]

    def _final(self, result: Relaxation, place: int) -> Structures:
        final = result.structures or self.loaded[place].structures
        assert final is not None
        return final

    def _identity(self, place: int, result: Relaxation) -> dict[str, str | int]:
        one = self.loaded[place]
        facts: dict[str, str | int] = {
            "coset_input": one.input,
            "coset_index": one.index,
            "coset_status": result.status,
        }
        if result.space_group_after is not None:
            facts["coset_space_group"] = result.space_group_after
        return facts


def check_single_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that does not say extended XYZ, or that exists."""
    if path.suffix not in ONE_FILE:
        raise ConfigError(
            f"-o {path}: one file for all results is extended XYZ ({', '.join(ONE_FILE)})",
            field="output",
            hint="coset relax writes one file per input, in its own format, to a directory",
        )
    _refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise FileExistsError(f"{path} exists already; --force overwrites it")


def _free(path: Path, taken: Container[Path]) -> Path:
    """The path, with a number behind its stem where another input has the name."""
    candidate, number = path, 2
    while candidate in taken:
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def _known(properties: Properties | None, one: Structures) -> Properties:
    """Energy, forces and stress of one system, NaN where there are none."""
    found = properties or Properties()
    n_atoms, like = len(one.atomic_numbers), one.cell.double()
    return Properties(
        energy=like.new_full((1,), torch.nan) if found.energy is None else found.energy,
        forces=like.new_full((n_atoms, 3), torch.nan) if found.forces is None else found.forces,
        stress=like.new_full((1, 3, 3), torch.nan) if found.stress is None else found.stress,
    )
