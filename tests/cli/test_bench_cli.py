"""coset bench on a reference folder made here."""

import json
import signal
from unittest import mock

import pytest

from coset.protocols import runs
from tests.cli.test_cli import FIELDS, document, run
from tests.protocols.reference_folder import make_reference


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Where the first material is done."""
    where = tmp_path_factory.mktemp("bench")
    result = run("bench", "eos-acwf", "--data", data, "--limit", "1", "--plot", cwd=where)
    assert result.returncode == 0, result.stderr
    for word in ("epsilon_median", "VASP, PBE", "coset-xs-0 (here)", "1 of 1 materials"):
        assert word in result.stderr
    return where


def test_a_quick_look_leaves_records_a_summary_and_a_figure(folder):
    out = folder / "bench-eos-acwf"
    assert {p.name for p in out.iterdir()} == {
        "manifest.json",
        "records",
        "summary.json",
        "parity.png",
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["protocol"] == "eos-acwf"
    assert manifest["potential"]["name"] == "coset-xs-0"
    assert len(manifest["data"]["acwf/results-unaries-verification-PBE-v1-AE-average.json"]) == 64


def test_the_same_command_goes_on_and_gives_one_document(folder, data):
    records = folder / "bench-eos-acwf" / "records"
    before = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    result = run("bench", "eos-acwf", "--data", data, "--json", cwd=folder)
    assert result.returncode in (0, 1), result.stderr  # what the model makes of simple cubic
    found = document(result)
    assert (found["n_done"], found["n_materials"]) == (2, 2)
    assert set(found["results"][0]) >= FIELDS | {"values", "unseen", "seconds"}
    assert set(found["results"][0]["values"]) >= {"volume_A3_per_atom", "epsilon", "nu"}
    assert {"name", "group", "value", "count"} == set(found["metrics"][0])
    assert found["manifest"]["settings"]["eos"]["points"] == 7
    after = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    assert len(after) == 2
    assert before.items() <= after.items()


def test_another_precision_is_another_run(folder, data):
    result = run("bench", "eos-acwf", "--data", data, "--dtype", "float32", cwd=folder)
    assert result.returncode == 2
    assert "potential.dtype: float64 -> float32" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_keeps_its_records(data, tmp_path, number):
    real = runs.measured

    def measured_then_stopped(*arguments):
        found = real(*arguments)
        signal.raise_signal(number)
        return found

    with mock.patch.object(runs, "measured", measured_then_stopped):
        result = run("bench", "eos-acwf", "--data", data, "-o", "out", cwd=tmp_path)
    assert result.returncode == 75, result.stderr
    assert len(list((tmp_path / "out" / "records").iterdir())) == 1
    assert "1 of 2 materials" in result.stderr


def test_missing_data_are_named(tmp_path):
    result = run("bench", "heat-capacity", "--data", "nowhere", "--json", cwd=tmp_path)
    assert result.returncode == 2
    assert "nowhere/heat_capacity_alexandria_binaries.extxyz" in result.stderr
    assert document(result)["error"]["code"] == "NoReference"
    assert not (tmp_path / "bench-heat-capacity").exists()


def test_only_a_subset_can_be_left(data, tmp_path):
    result = run("bench", "eos-acwf", "--data", data, "--all", cwd=tmp_path)
    assert result.returncode == 2
    assert "has no subset" in result.stderr


def test_an_unknown_protocol_is_refused(data, tmp_path):
    result = run("bench", "discovery", "--data", data, cwd=tmp_path)
    assert result.returncode == 2
