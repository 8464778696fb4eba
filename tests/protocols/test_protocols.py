"""Protocols: metrics on synthetic rows, manifests, records that resume, reference data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_models import lennard_jones_edges, silicon, stillinger_weber
from factories import BCC, crystal

from coset.errors import ConfigError
from coset.protocols import COMPLETE, PROTOCOLS
from coset.protocols.elasticity import BULK, SHEAR, ElasticityProtocol
from coset.protocols.eos_acwf import SLOPE, VOLUME, EosAcwfProtocol, epsilon, nu
from coset.protocols.frequencies import (
    Frequencies103Protocol,
    is_imaginary,
    quantiles,
    spectrum_distance,
)
from coset.protocols.heat_capacity import HEAT, HeatCapacityProtocol
from coset.protocols.kappa import TWELVE, KappaProtocol, relative_difference
from coset.protocols.manifest import differences, manifest_of
from coset.protocols.metrics import error_metrics, mean_metrics
from coset.protocols.records import Entry, Found, Row, Value, measured
from coset.protocols.results import begin, save
from coset.protocols.runs import run_benchmark
from coset.workflows.conductivity.results import PHONONDB_V1
from coset.workflows.elasticity.run import ElasticSettings
from coset.workflows.harmonic import HarmonicSettings
from tests.protocols.reference_folder import make_reference

CPU = torch.device("cpu")
POTENTIAL = {"name": "test", "sha256": "00"}
SMALL = {
    "elasticity": ElasticityProtocol(elastic=ElasticSettings(frames=3)),
    "eos-acwf": EosAcwfProtocol(),
    "frequencies-103": Frequencies103Protocol(),
    "heat-capacity": HeatCapacityProtocol(min_edge=8.0),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def potential():
    return stillinger_weber()


def row(key="a", *values, unseen=False, status="ok"):
    return Row(
        key=key,
        formula="Si",
        unseen=unseen,
        n_atoms=2,
        seconds=1.0,
        status=status,
        code="",
        reason="",
        values=values,
        own=(1.0, 2.0),
        reference=(1.0, 2.5),
    )


def named(metrics, name, group="all"):
    (found,) = [m for m in metrics if (m.name, m.group) == (name, group)]
    return found


def manifest(benchmark, data, **changes):
    return replace(manifest_of(benchmark, data, POTENTIAL, CPU), **changes)


# Metrics


def test_errors_are_those_of_the_definition_in_every_group():
    rows = [
        row("a", Value(name=BULK, own=110.0, reference=100.0)),
        row("b", Value(name=BULK, own=40.0, reference=50.0)),
        row("c", Value(name=BULK, own=26.0, reference=20.0), unseen=True),
    ]
    metrics = error_metrics(rows, BULK, unit="GPa")
    assert named(metrics, "bulk_modulus_mae_GPa").value == pytest.approx(26 / 3, abs=1e-12)
    assert named(metrics, "bulk_modulus_median_GPa").value == 10.0
    assert named(metrics, "bulk_modulus_bias_GPa").value == pytest.approx(2.0, abs=1e-12)
    assert named(metrics, "bulk_modulus_relative_percent", "seen").value == pytest.approx(15.0)
    assert named(metrics, "bulk_modulus_mae_GPa", "unseen").value == pytest.approx(6.0, abs=1e-12)
    assert named(metrics, "bulk_modulus_mae_GPa", "seen").count == 2


def test_groups_without_rows_have_no_metrics():
    metrics = mean_metrics([row("a", Value(name="x", own=3.0))], "x")
    assert {(m.group, m.value) for m in metrics} == {("all", 3.0), ("seen", 3.0)}
    assert error_metrics([], BULK, unit="GPa") == []


FIT = {VOLUME: 20.0, BULK: 90.0, SLOPE: 4.2}


def test_both_distances_of_fits_vanish_for_equal_fits_and_are_symmetric():
    other = {VOLUME: 20.5, BULK: 80.0, SLOPE: 5.0}
    for distance in (epsilon, nu):
        assert distance(FIT, FIT) < 1e-9
        assert abs(distance(FIT, other) - distance(other, FIT)) < 1e-12


def test_nu_is_the_relative_error_of_one_parameter_times_its_weight():
    share = 2 * (20.5 - 20.0) / 40.5
    assert abs(nu(FIT, FIT | {VOLUME: 20.5}) - 100 * share) < 1e-12
    assert abs(nu(FIT, FIT | {BULK: 99.0}) - 100 * (2 * 9 / 189) / 20) < 1e-12
    assert abs(nu(FIT, FIT | {SLOPE: 4.6}) - 100 * (2 * 0.4 / 8.8) / 400) < 1e-12


def test_epsilon_of_shifted_parabolas():
    """E = k(V - V0)²/2 apart by d, half width h: <(dE)²> = (k d)² h²/3, var E = k² h⁴/45 + ..."""
    shift, half = 1e-3 * 20.0, 0.06 * 20.0
    # d²E/dV³ of Birch's form vanishes at V0 for B' = -1
    one, other = ({VOLUME: 20.0 + s * shift / 2, BULK: 90.0, SLOPE: -1.0} for s in (-1, 1))
    expected = shift * np.sqrt(half**2 / 3) / np.sqrt(half**4 / 45)
    assert abs(epsilon(one, other) / expected - 1.0) < 0.01


def test_the_distance_of_spectra_counts_every_mode_of_the_mesh():
    one = np.array([[1.0, 2.0], [3.0, 5.0]])
    weights = np.array([1, 3])
    assert spectrum_distance(one, one + 0.4, weights) == pytest.approx(0.4, abs=1e-12)
    moved = one.copy()
    moved[1, 1] += 1.0  # three of eight modes
    assert spectrum_distance(one, moved, weights) == pytest.approx(3 / 8, abs=1e-12)
    assert quantiles(one, weights, np.array([0.0, 1.0])).tolist() == [1.0, 5.0]


@pytest.mark.parametrize(
    ("gamma", "other", "expected"),
    [
        ((-0.009, 0.0, 0.0, 3.0), (1.0, 1.0, 2.0, 3.0), False),
        ((-0.02, 0.0, 0.0, 3.0), (1.0, 1.0, 2.0, 3.0), True),
        ((0.0, 0.0, 0.0, -0.001), (1.0, 1.0, 2.0, 3.0), True),
        ((0.0, 0.0, 0.0, 3.0), (-0.001, 1.0, 2.0, 3.0), True),
    ],
)
def test_which_modes_are_imaginary(gamma, other, expected):
    q = np.array([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]])
    assert is_imaginary(np.array([gamma, other]), q, 0.01) is expected


# Manifest and records


@pytest.mark.parametrize(
    "changed",
    [
        ElasticityProtocol(subset=100),
        ElasticityProtocol(route="strains"),
        ElasticityProtocol(elastic=ElasticSettings(frames=4)),
        ElasticityProtocol(amplitudes=(-0.01, 0.01)),
        ElasticityProtocol(force_tolerance=2e-3),
    ],
)
def test_the_hash_changes_with_every_setting(data, changed):
    one, other = manifest(ElasticityProtocol(), data), manifest(changed, data)
    assert one.sha256 == manifest(ElasticityProtocol(), data).sha256
    assert one.sha256 != other.sha256
    assert one.settings_sha256 != other.settings_sha256
    assert len(differences(one.document(), other.document())) == 1


@pytest.mark.parametrize("field", ["potential", "versions", "hardware", "data"])
def test_the_hash_changes_with_everything_else(data, field):
    one = manifest(ElasticityProtocol(), data)
    other = replace(one, **{field: dict(getattr(one, field)) | {"something": "else"}})
    assert one.sha256 != other.sha256
    assert one.settings_sha256 == other.settings_sha256


def test_records_come_back_as_they_were(data, tmp_path):
    one = manifest(ElasticityProtocol(), data)
    assert begin(tmp_path / "out", one) == {}
    kept = row("mp-1", Value(name=BULK, own=1.0 / 3.0, reference=None))
    save(tmp_path / "out", kept)
    assert begin(tmp_path / "out", one) == {"mp-1": kept}


def test_results_of_something_else_are_refused(data, tmp_path):
    begin(tmp_path / "out", manifest(ElasticityProtocol(), data))
    with pytest.raises(ConfigError, match=r"settings\.subset: 200 -> None") as caught:
        begin(tmp_path / "out", manifest(COMPLETE["elasticity"](), data))
    assert caught.value.code == "OtherManifest"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no benchmark"):
        begin(tmp_path / "full", manifest(ElasticityProtocol(), data))


def test_a_damaged_record_is_named(data, tmp_path):
    one = manifest(ElasticityProtocol(), data)
    begin(tmp_path / "out", one)
    (tmp_path / "out" / "records").mkdir()
    (tmp_path / "out" / "records" / "mp-1.json").write_text('{"key": "mp-1"}')
    with pytest.raises(ConfigError, match=r"mp-1\.json") as caught:
        begin(tmp_path / "out", one)
    assert caught.value.code == "DamagedRecord"


# Runs


def test_the_order_is_that_of_hashes_and_the_subset_its_beginning(data):
    everything = [one.key for one in COMPLETE["elasticity"]().entries(data)]
    assert len(everything) == 3
    assert [one.key for one in ElasticityProtocol(subset=2).entries(data)] == everything[:2]


def test_elements_where_spin_matters_are_left_out(data):
    keys = {one.key for one in EosAcwfProtocol().entries(data)}
    assert keys == {"Si-Diamond", "Si-SC"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)) as caught:
        PROTOCOLS[name]().entries(tmp_path)
    assert caught.value.code == "NoReference"


def test_a_run_goes_on_where_it_stopped(data, potential, tmp_path):
    benchmark = SMALL["eos-acwf"]
    arguments = (benchmark, potential, manifest(benchmark, data), benchmark.entries(data))
    stopped = run_benchmark(*arguments, tmp_path / "out", observer=lambda done, last: done == 1)
    assert len(stopped) == 1
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/records").iterdir()}
    assert len(times) == 1
    whole = run_benchmark(*arguments, tmp_path / "out")
    assert len(whole) == 2
    assert whole[0] == stopped[0]
    (name, then), *_ = times.items()
    assert (tmp_path / "out/records" / name).stat().st_mtime_ns == then


@pytest.mark.parametrize("name", SMALL)
def test_what_made_the_reference_has_no_error(name, data, potential, tmp_path):
    """The reference folder holds what Stillinger-Weber's silicon has, by other routes."""
    benchmark = SMALL[name]
    entries = benchmark.entries(data)
    rows = run_benchmark(benchmark, potential, manifest(benchmark, data), entries, tmp_path)
    done = [one for one in rows if one.status == "ok"]
    metrics = benchmark.summary(rows)
    published = benchmark.published(data, [one.key for one in done])
    assert [one.formula for one in done][:1] == ["Si"]
    if name == "elasticity":
        good = next(one for one in done if one.key == "mp-149")
        for value, tolerance in ((good.value(BULK), 0.05), (good.value(SHEAR), 0.05)):
            assert abs(value.own - value.reference) < tolerance
    if name == "heat-capacity":
        (value,) = [one.value(HEAT) for one in done]
        assert abs(value.own - value.reference) < 0.05
    if name == "frequencies-103":
        assert named(metrics, "frequency_mae_THz").value < 1e-3
        assert [one.name for one in published] == ["Good", "Bad"]
    if name == "eos-acwf":
        assert named(metrics, "epsilon_median").count == len(done)
        assert named(published[0].metrics, "nu_median").value == pytest.approx(0.1, abs=1e-3)
        assert published[0].name == "VASP, PBE"


def test_strains_and_derivatives_agree(data, potential):
    exact, strained = (
        ElasticityProtocol(route=route, force_tolerance=1e-5) for route in ("exact", "strains")
    )
    (entry,) = [one for one in exact.entries(data) if one.key == "mp-149"]
    one, other = exact.measure(potential, entry), strained.measure(potential, entry)
    for mine, theirs in zip(one.values, other.values, strict=True):
        assert abs(mine.own - theirs.own) < 0.1


def test_settings_of_the_displacement_route_are_other_settings(data):
    benchmark = HeatCapacityProtocol(harmonic=HarmonicSettings(route="displacements"))
    one, other = manifest(HeatCapacityProtocol(), data), manifest(benchmark, data)
    assert one.settings_sha256 != other.settings_sha256


def test_every_name_is_that_of_its_protocol(data):
    assert {name: PROTOCOLS[name]().name for name in PROTOCOLS} == {n: n for n in PROTOCOLS}
    assert len(TWELVE) == len(set(TWELVE)) == 12
    (entry,) = PROTOCOLS["kappa-103"]().entries(data)
    assert entry.conductivity.supercell == entry.conductivity.supercell_fc2 == (2, 2, 2)
    assert entry.conductivity.mesh == (4, 4, 4)
    assert PROTOCOLS["kappa-12"]().entries(data) == []


def test_materials_without_conductivity_count_with_the_worst_distance(data):
    assert relative_difference(3.0, 1.0) == 1.0
    rows = [
        row("a", Value(name="sre", own=0.5), Value(name="kappa_W_per_mK", own=3.0, reference=5.0)),
        row("b", Value(name="sre", own=2.0), Value(name="imaginary", own=1.0)),
    ]
    metrics = PROTOCOLS["kappa-103"]().summary([replace(one, status="ok") for one in rows])
    assert named(metrics, "sre").value == 1.25
    assert named(metrics, "kappa_mae_W_per_mK").count == 1
    published = PROTOCOLS["kappa-103"]().published(data, ["mp-149"])
    assert published[0].metrics[0].value == pytest.approx(2 * 10 / 190)


@pytest.mark.parametrize("route", ["exact", "strains"])
def test_a_crystal_that_shears_apart_has_no_moduli(route):
    """bcc with pair forces has C11 < C12."""
    bcc = crystal(3.45 * np.array(BCC), [(0, 0, 0)], [18])
    entry = Entry(key="x", structures=bcc, values={BULK: 1.0, SHEAR: 1.0})
    found = measured(ElasticityProtocol(route=route), lennard_jones_edges(12.0, sigma=3.0), entry)
    assert (found.status, found.code) == ("not_converged", "UnstableStrain")
    assert "GPa in one direction" in found.reason


def test_values_that_are_not_finite_are_a_fault(potential):
    class Broken(EosAcwfProtocol):
        def measure(self, potential, entry):
            values = (Value(name="a", own=1.0), Value(name="b", own=float("nan")))
            return Found(status="ok", values=values)

    entry = Entry(key="x", structures=silicon(), values={})
    found = measured(Broken(), potential, entry)
    assert (found.status, found.code, len(found.values)) == ("failed", "Undefined", 1)


@pytest.mark.slow
def test_kappa_runs_with_the_settings_of_each_material(data, potential):
    pytest.importorskip("phono3py")
    benchmark = KappaProtocol(conductivity=replace(PHONONDB_V1, frames=1))
    (entry,) = benchmark.entries(data)
    found = measured(benchmark, potential, entry)
    assert (found.status, found.reason) == ("ok", "")
    kappa, srd, sre = (found.value(name) for name in ("kappa_W_per_mK", "srd", "sre"))
    assert kappa.own > 10.0
    assert srd.own == relative_difference(kappa.own, 100.0)
    assert sre.own == abs(srd.own)
    assert found.value("imaginary").own == 0.0
