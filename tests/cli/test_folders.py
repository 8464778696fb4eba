"""What commands with one folder per structure write, and when."""

import json

import ase.io
import pytest
from ase.build import bulk

from coset.ase_interface import read_structures
from coset.cli.common import Dtype, open_session
from coset.cli.folders import FolderCommand

FILES = ("notes.txt", "part-*.txt")


@pytest.fixture(scope="module")
def session():
    return open_session(None, target=None, device="cpu", dtype=Dtype.float64, threads=None)


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, distance in (("Al", 4.05), ("Cu", 3.6)):
        ase.io.write(f"{name}.cif", bulk(name, "fcc", distance))
    return read_structures(["Al.cif", "Cu.cif"])


def command(compute, write=None):
    def plain_write(folder, one, record, result):
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text(str(result))
        return True

    return FolderCommand(
        name="toy",
        settings={},
        compute=compute,
        fields=lambda result, one: {"status": "ok", "value": result},
        show=lambda records: None,
        write=write or plain_write,
        files=FILES,
    )


def run(command, session, loaded, *, overwrite=False):
    return command.run(session, loaded, None, overwrite=overwrite, as_json=False)


def test_what_is_finished_survives_what_kills_the_next(session, loaded, tmp_path):
    def compute(structures, flag, keep):
        keep(0, 17)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(command(compute), session, loaded)
    record = json.loads((tmp_path / "Al-toy" / "toy.json").read_text())
    assert (record["value"], record["status"]) == (17, "ok")
    assert not (tmp_path / "Cu-toy").exists()


def test_nothing_of_an_older_result_stays_beside_the_new_one(session, loaded, tmp_path):
    folder = tmp_path / "Al-toy"
    folder.mkdir()
    for name in ("part-1.txt", "part-2.txt", "toy.json", "mine.txt"):
        (folder / name).write_text("old")

    def compute(structures, flag, keep):
        keep(0, 1)
        keep(0, 2)
        keep(1, 3)

    assert run(command(compute), session, loaded, overwrite=True) == 0
    assert {path.name for path in folder.iterdir()} == {"toy.json", "notes.txt", "mine.txt"}
    assert json.loads((folder / "toy.json").read_text())["value"] == 2


def test_a_folder_that_cannot_be_written_costs_only_itself(session, loaded, tmp_path, capsys):
    def write(folder, one, record, result):
        if result == 0:
            raise OSError("disk full")
        folder.mkdir()
        return True

    def compute(structures, flag, keep):
        keep(0, 0)
        keep(1, 1)

    assert run(command(compute, write), session, loaded) == 74
    assert "disk full" in capsys.readouterr().err
    assert (tmp_path / "Cu-toy" / "toy.json").exists()
