"""Thermal conductivity: two routes to one number, files, errors, and what is refused."""

import importlib
import sys
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
from analytic_models import lonsdaleite, silicon, stillinger_weber
from ase.build import bulk
from factories import FCC, crystal, fail_once

from coset.ase_interface.kappa_cases import read_kappa_cases
from coset.derivatives import hessian
from coset.edge_model import IDENTITY
from coset.errors import ConfigError, MissingExtraError, StructureError
from coset.protocols.mode_kappa import relative_mode_error
from coset.protocols.records import Spectrum
from coset.structures import concatenate, make_structure, repeat
from coset.symmetry.crystal import find_group
from coset.symmetry.primitive import primitive_cell
from coset.workflows.conductivity import by_phono3py
from coset.workflows.conductivity.by_phono3py import anharmonic
from coset.workflows.conductivity.results import PHONONDB_V1, ConductivitySettings
from coset.workflows.conductivity.run import conductivity, jackknife, supercell_matrix
from coset.workflows.conductivity.samples import second_order
from coset.workflows.phonons.mesh import action_of

SMALL = ConductivitySettings(
    frames=1, mesh=(5, 5, 5), supercell=(2, 2, 2), supercell_fc2=(2, 2, 2), amplitude=0.005
)
"""Supercells of 16 atoms: the neighbors of Stillinger and Weber are within 3.8 Å."""
MESH = (5, 5, 5)


def test_without_phono3py_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "phono3py", None)
    with pytest.raises(MissingExtraError, match=r"pip install coset\[conductivity\]"):
        conductivity(stillinger_weber(), silicon(), SMALL)


def test_settings_without_meaning():
    for changes in ({"method": "best"}, {"frames": 0}, {"mesh": (0, 1, 1)}, {"amplitude": 0.0}):
        with pytest.raises(ConfigError):
            replace(SMALL, **changes)
    with pytest.raises(ConfigError):
        ConductivitySettings(temperatures=(0.0,))


def test_the_protocol_reads_supercells_and_mesh(tmp_path):
    atoms = bulk("MgO", "rocksalt", 4.2, cubic=True)
    atoms.info |= {
        "fc3_supercell": 2 * np.eye(3, dtype=int),
        "fc2_supercell": 4 * np.eye(3, dtype=int),
        "q_mesh": np.array([19, 19, 15]),
        "mp_id": "mp-0",
        "symm.no": 225,
    }
    path = tmp_path / "cases.extxyz"
    ase.io.write(path, [atoms])
    (case,) = read_kappa_cases(str(path))
    assert (case.material_id, case.space_group, len(case.structures)) == ("mp-0", 225, 1)
    expected = replace(PHONONDB_V1, supercell=(2, 2, 2), supercell_fc2=(4, 4, 4), mesh=(19, 19, 15))
    assert case.settings == expected
    assert (expected.amplitude, expected.method, expected.isotopes) == (0.03, "wigner", True)
    atoms.info["fc2_supercell"] = np.ones((3, 3), dtype=int)
    ase.io.write(path, [atoms])
    with pytest.raises(StructureError, match="diagonal"):
        read_kappa_cases(str(path))


def test_the_jackknife_finds_a_resistance_that_frames_share():
    """1/kappa of a mean over m frames is 2 + 3/m."""
    m = 5
    without, whole = (3.0 / (2.0 + 3.0 / n) for n in (m - 1, m))
    tensors = np.broadcast_to(without / 3.0 * np.eye(3), (m, 1, 3, 3))
    error, share = jackknife(tensors, np.array([whole]))
    assert np.abs(error).max() < 1e-15
    assert share[0] == pytest.approx((3.0 / m) / (2.0 + 3.0 / m), abs=1e-12)
    values = np.array([1.0, 1.1, 0.8, 0.9, 1.2])
    means = (values.sum() - values) / (m - 1)
    error, _ = jackknife(means[:, None, None, None] * np.ones((m, 1, 3, 3)), np.array([3.0]))
    assert error[0, 0, 0] == pytest.approx(values.std(ddof=1) / m**0.5, abs=1e-12)


phono3py = pytest.importorskip("phono3py")


@pytest.fixture(scope="module")
def routes():
    """Silicon by both routes at equal amplitude."""
    return {
        route: conductivity(stillinger_weber(), silicon(), replace(SMALL, derivatives=route))[0]
        for route in ("displacements", "exact")
    }


def constants(found):
    calculation = found.result.anharmonic.phono3py
    return np.array(calculation.fc2), np.array(calculation.fc3)


def test_force_constants_of_both_routes_agree(routes):
    """Both have an error of h², 2.5e-3 and 1.3e-3 of 27 eV/Å³ at 0.01 Å (design notes)."""
    (second, third), (exact_second, exact_third) = map(constants, routes.values())
    assert np.abs(third - exact_third).max() < 1e-3 * np.abs(exact_third).max()
    assert np.abs(second - exact_second).max() < 1e-3 * np.abs(exact_second).max()
    assert routes["exact"].result.residual_fc3 < 1e-3
    assert routes["displacements"].result.residual_fc3 is None


def test_conductivity_of_both_routes_agrees(routes):
    for found in routes.values():
        assert found.status == "ok", found.reason
        assert found.result.space_group == 227
        assert found.result.error is None
        assert set(found.result.kappa.by_method) == {"rta", "wigner"}
    for method in ("rta", "wigner", "lbte"):
        first, second = (
            found.result.anharmonic.kappa(
                MESH, (300.0,), isotopes=True, boundary_um=None, method=method
            ).by_method
            for found in routes.values()
        )
        one, other = first[method][0], second[method][0]
        assert np.allclose(one, one[0, 0] * np.eye(3), atol=1e-6 * one[0, 0])  # cubic
        # On so coarse a mesh the last digit of the force constants changes kappa by up to 3e-3.
        assert one[0, 0] == pytest.approx(other[0, 0], rel=5e-3)
    assert one[0, 0] > first["rta"][0, 0, 0]  # normal processes do not resist


def test_modes_are_compared_at_equal_stars(routes):
    """The same modes in another primitive cell, at other members of the stars, in another order."""
    found = routes["exact"].result
    modes, cell = found.kappa.modes, found.primitive.cell[0].numpy()
    other = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    action = action_of(found.primitive, find_group(found.primitive, 1e-5))
    turned = action.images(modes.q_points)[7] @ other.T
    order = np.random.default_rng(0).permutation(len(turned))

    def reference(scale, q=turned):
        return Spectrum(
            supercell=(1, 1, 1),
            primitive_matrix=other.T,
            q_points=np.round(-q[order], 10),
            weights=modes.weights[order],
            frequency_THz=modes.frequency_THz[order],
            share=scale * modes.share[0][order],
        )

    assert relative_mode_error(found, reference(1.0), 1.01 * cell) < 1e-9
    assert relative_mode_error(found, reference(3.0), 1.01 * cell) == pytest.approx(1.0, abs=1e-9)
    assert relative_mode_error(found, reference(1.0, 1.1 * turned), 1.01 * cell) is None


@pytest.mark.parametrize(
    ("method", "told", "name"),
    [
        ("rta", {}, "kappa"),
        ("wigner", {"transport_type": "SMM19"}, "kappa_intra"),
        ("lbte", {"is_LBTE": True}, "kappa"),
    ],
)
def test_kappa_is_that_of_phono3py_itself(routes, method, told, name):
    """Walls of 1 µm are strong here: every argument must arrive."""
    own = routes["exact"].result.anharmonic
    ours = own.kappa((3, 3, 3), (200.0, 300.0), isotopes=True, boundary_um=1.0, method=method)
    own.phono3py.init_phph_interaction()  # its own strengths of interaction
    own.phono3py.run_thermal_conductivity(
        temperatures=[200.0, 300.0], is_isotope=True, boundary_mfp=1.0, **told
    )
    theirs = getattr(own.phono3py.thermal_conductivity, name)[0]
    found = ours.lbte if method == "lbte" else ours.rta
    assert np.allclose(np.diagonal(found, axis1=1, axis2=2), theirs[:, :3], rtol=1e-12, atol=0.0)


def test_what_does_not_fit_into_memory_is_left_to_phono3py(routes, monkeypatch):
    own = routes["exact"].result.anharmonic
    told = {"isotopes": True, "boundary_um": None, "method": "rta"}
    fast = own.kappa(MESH, (300.0,), **told).rta
    assert "run" in vars(own.phono3py.phph_interaction)
    monkeypatch.setattr(by_phono3py, "STRENGTH_BYTES", 0)
    assert np.allclose(own.kappa(MESH, (300.0,), **told).rta, fast, rtol=1e-12, atol=1e-12)
    assert "run" not in vars(own.phono3py.phph_interaction)


def test_shares_add_up(routes):
    kappa = routes["exact"].result.kappa
    modes = kappa.modes
    total = np.trace(kappa.rta[0] + kappa.coherences[0]) / 3.0
    assert modes.share[0].sum() == pytest.approx(total, rel=1e-9)
    assert modes.weights.sum() == 5**3
    assert np.all(modes.mean_free_path >= 0.0)
    assert np.array_equal(routes["exact"].result.value, kappa.rta + kappa.coherences)
    # kappa = c v² tau / 3, and v tau is the free path: faster than 10 km/s is nothing here.
    assert modes.mean_free_path.max() < 100.0 / modes.linewidth_THz[modes.linewidth_THz > 0].min()


def test_files_are_read_by_phono3py(routes, tmp_path, monkeypatch):
    found = routes["exact"].result
    found.anharmonic.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    again = phono3py.load("phono3py_params.yaml", log_level=0)
    assert np.array_equal(again.fc3, found.anharmonic.phono3py.fc3)
    again.mesh_numbers = [5, 5, 5]
    again.init_phph_interaction()
    again.run_thermal_conductivity(temperatures=[300.0], is_isotope=True, transport_type="SMM19")
    kappa = again.thermal_conductivity.kappa[0, 0, 0]
    assert kappa == pytest.approx(
        found.value[0, 0, 0], rel=1e-2
    )  # the choice of tetrahedra hangs on rounding


@pytest.mark.parametrize("shift", [0.0, -1e-17, 2.0])
def test_second_order_is_the_hessian_of_the_supercell(shift):
    """Also where its vectors are no multiples of primitive ones, and where phono3py wraps atoms."""
    potential, one = stillinger_weber(reach=2.1), lonsdaleite()
    moved = torch.tensor([shift, 0.0, 0.0, -2.0 * shift]).double()
    one = replace(one, positions=one.positions + moved[:, None] * one.cell[0, 0])
    if shift == -1e-17:
        one = replace(one, positions=one.positions - one.positions[0] + shift)
    turned = np.array([[1, 1, 0], [-1, 2, 0], [0, 0, 1]])
    crystal_ = anharmonic(one, np.eye(3, dtype=int), turned)
    found = second_order(potential, one, crystal_, IDENTITY)
    large = crystal_.supercell_fc2
    assert torch.allclose(large.cell[0], torch.from_numpy(turned).double() @ one.cell[0])
    expected = hessian(potential, large).numpy().transpose(0, 2, 1, 3)
    assert np.abs(found - expected[crystal_.movable[1]]).max() < 1e-9


def test_errors_come_from_frames_and_symmetry_is_kept():
    potential = stillinger_weber(turning=0.01)
    settings = replace(SMALL, frames=3, derivatives="exact")
    (found,) = conductivity(potential, repeat(silicon(), (1, 1, 2)), replace(
        settings, supercell=(2, 2, 1), supercell_fc2=(2, 2, 1)))  # fmt: skip
    assert found.status == "ok", found.reason
    value, error = found.result.value[0], found.result.error[0]
    assert np.allclose(value, value[0, 0] * np.eye(3), atol=1e-6 * value[0, 0])
    assert 0.0 < error[0, 0] < 0.1 * value[0, 0]
    assert found.result.residual_fc3 > 0.01
    edges = np.linalg.norm(found.result.supercell @ found.result.primitive.cell[0].numpy(), axis=1)
    assert edges == pytest.approx(2 * silicon().cell[0].norm(dim=1).numpy(), rel=0.01)


def test_imaginary_modes_give_no_number_unless_it_is_asked_for():
    """Diamond where bonds prefer an angle that it does not have."""
    potential, one = stillinger_weber(cosine=-0.2), silicon()
    settings = replace(SMALL, relaxation=None, mesh=(3, 3, 3), method="rta")
    (found,) = conductivity(potential, one, settings)
    assert (found.status, found.code) == ("not_converged", "ImaginaryModes")
    assert found.result.kappa is None
    assert found.result.lowest_THz < 0.0
    (forced,) = conductivity(potential, one, replace(settings, allow_imaginary=True))
    assert (forced.status, forced.warnings) == ("ok", ("ImaginaryModesLeftOut",))
    assert forced.result.kappa is not None


@pytest.mark.parametrize("word", ["forces", "wave vector 2 of"])
def test_one_bad_structure_stops_nothing_and_a_stop_is_told(word):
    slab = replace(silicon(), pbc=torch.tensor([[True, True, False]]))
    overlapping = make_structure(
        torch.zeros(2, 3).double(),
        torch.tensor([14, 14]),
        cell=4.0 * torch.eye(3).double(),
        pbc=(True, True, True),
    )
    batch = concatenate([slab, overlapping, silicon()])
    seen = []

    def observer(n_done, note):
        seen.append((n_done, note))
        return n_done == 2 and word in note

    first, second, third = conductivity(stillinger_weber(), batch, SMALL, observer=observer)
    assert (first.status, first.code) == ("rejected", "CellNotPeriodic")
    assert second.status == "rejected"
    assert (third.status, third.code) == ("not_converged", "Interrupted")
    assert seen[-1][0] == 2
    assert word in seen[-1][1]


def test_an_error_of_phono3py_stops_its_crystal_only(monkeypatch):
    factory = importlib.import_module("phono3py.conductivity.factory")
    error = RuntimeError("Grid symmetry is broken")
    fail_once(monkeypatch, factory, "conductivity_calculator", error)
    first, second = conductivity(stillinger_weber(), concatenate([silicon()] * 2), SMALL)
    assert (first.status, first.code) == ("failed", "InternalError")
    assert "RuntimeError: Grid symmetry is broken (factories.py" in first.reason
    assert second.status == "ok"


def test_default_supercells_and_what_breaks_symmetry():
    one = crystal(3.9 * np.array(FCC), [(0, 0, 0)], [14])
    primitive = primitive_cell(one, find_group(one, 1e-5))
    matrix = supercell_matrix(primitive, None, 10.0)
    rows = matrix @ primitive.structures.cell[0].numpy()
    assert np.allclose(rows @ rows.T, (3 * 3.9) ** 2 * np.eye(3))
    settings = replace(SMALL, supercell=(1, 1, 2))
    (found,) = conductivity(stillinger_weber(), silicon(), settings)
    assert (found.status, found.code) == ("failed", "AsymmetricMesh")
