"""Materials of the benchmark kappa-103 with the supercells and mesh that belong to each."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coset.ase_interface.files import read_structures
from coset.errors import StructureError
from coset.structures import Structures
from coset.workflows.conductivity.results import PHONONDB_V1, ConductivitySettings
from coset.workflows.phonons.mesh import Mesh

FIELDS = ("mp_id", "fc3_supercell", "fc2_supercell", "q_mesh")


@dataclass(frozen=True, kw_only=True, slots=True)
class KappaCase:
    """One material; `settings` are those of protocol `phonondb-v1` for it."""

    material_id: str
    name: str
    space_group: int | None
    structures: Structures
    settings: ConductivitySettings


def read_kappa_cases(path: str) -> list[KappaCase]:
    """Every frame of a file whose info has mp_id, fc3_supercell, fc2_supercell and q_mesh.

    Raises:
        StructureError: "BadCase", something is missing or not as expected.
    """
    cases = []
    for one in read_structures([path]):
        if one.error is not None:
            raise one.error
        assert one.atoms is not None
        assert one.structures is not None
        info, where = one.atoms.info, f"{path}@{one.index}"
        if missing := [name for name in FIELDS if name not in info]:
            raise _bad(where, f"has no {', '.join(missing)} in its info")
        settings = replace(
            PHONONDB_V1,
            supercell=_diagonal(info["fc3_supercell"], where),
            supercell_fc2=_diagonal(info["fc2_supercell"], where),
            mesh=_three(info["q_mesh"], where),
        )
        group = info.get("symm.no")
        cases.append(
            KappaCase(
                material_id=str(info["mp_id"]),
                name=str(info.get("name", one.atoms.get_chemical_formula())),
                space_group=None if group is None else int(group),
                structures=one.structures,
                settings=settings,
            )
        )
    return cases


def _diagonal(value: Any, where: str) -> Mesh:  # noqa: ANN401
    matrix = np.asarray(value)
    if matrix.shape != (3, 3) or np.count_nonzero(matrix - np.diag(np.diag(matrix))):
        raise _bad(where, f"has the supercell {value!r:.60}, expected a diagonal 3 x 3 matrix")
    return _three(np.diag(matrix), where)


def _three(value: Any, where: str) -> Mesh:  # noqa: ANN401
    numbers = np.asarray(value).ravel()
    if len(numbers) != 3 or numbers.min() < 1 or np.any(numbers != np.rint(numbers)):
        raise _bad(where, f"has {value!r:.60}, expected three positive integers")
    a, b, c = (int(n) for n in numbers)
    return a, b, c


def _bad(where: str, what: str) -> StructureError:
    return StructureError(f"{where} {what}", code="BadCase", field="info")
