"""Lattice constants and bulk moduli of common crystals, relaxed from their PBE geometry."""

from dataclasses import replace
from pathlib import Path

import torch

from coset.structures import Structures, concatenate
from coset.workflows.relax import relax
from coset.workflows.relaxation import RelaxSettings
from model_card.reference import (
    Reference,
    elastic_binaries,
    equations_of_state,
    ground_state,
    prototype_binaries,
)
from model_card.statistics import percent, spread
from model_card.strains import bulk_moduli
from model_card.subjects import Progress, Subject

CLOSE = RelaxSettings(force_tolerance=0.003, stress_tolerance_GPa=0.003, max_steps=300)
"""Leaves less than 0.01 % in the lattice constant of a crystal of 10 GPa."""

CUBIC_ELEMENTS = {
    "FCC": "Al Ca Cu Rh Pd Ag Ir Pt Au Pb",
    "BCC": "Li Na K V Nb Mo Ta W",
    "Diamond": "C Si Ge",
}
"""Against the same all-electron averages as the equations of state."""

OTHER_ELEMENTS = "Be Mg Ti Fe Co Ni Zn Zr"
"""Hexagonal or magnetic; only the volume is compared, as a length."""

PROTOTYPES = {
    225: "LiF LiCl NaF NaCl KCl KBr MgO CaO SrO BaO CaS PbS PbTe AgCl",
    216: "BN SiC AlP AlAs GaP GaAs InP InAs InSb ZnS ZnSe CdTe CuCl",
    186: "BeO AlN GaN InN ZnO CdS",
}
NAMES = {225: "rocksalt", 216: "zincblende", 186: "wurtzite"}

OTHER_BINARIES = {
    "TiC": "mp-631",
    "ZrC": "mp-2795",
    "VC": "mp-1282",
    "TaC": "mp-1086",
    "ZrN": "mp-1352",
    "NbN": "mp-1580",
    "TiCo (CsCl type)": "mp-823",
    "CuZn (CsCl type)": "mp-987",
    "LiAg (CsCl type)": "mp-2426",
    "AlRu (CsCl type)": "mp-542569",
    "CaF2": "mp-2741",
    "PbF2": "mp-315",
    "Li2S": "mp-1153",
    "ZrO2 (cubic)": "mp-1565",
    "ThO2": "mp-643",
    "Mg2Sn": "mp-2343",
    "TiO2 (rutile)": "mp-2657",
    "RuO2": "mp-825",
    "MgF2": "mp-1249",
    "SiO2 (quartz)": "mp-7000",
    "MgB2": "mp-763",
    "MgCu2": "mp-1038",
    "V3Si": "mp-2567",
    "FeSi": "mp-871",
    "Cu2O": "mp-361",
}


def measure(subject: Subject, data: Path, progress: Progress) -> dict:
    """Errors of every length and modulus in percent, and their summaries."""
    wanted = [one for one in common_crystals(data) if subject.knows(one.structure)]
    progress(0, len(wanted))
    results = relax(subject.potential, concatenate([one.structure for one in wanted]), CLOSE)
    done = [
        (one, result.structures)
        for one, result in zip(wanted, results, strict=True)
        if result.status == "converged"
    ]
    progress(len(done), len(wanted))
    moduli = bulk_moduli(subject.potential, [relaxed for _, relaxed in done])
    rows = {
        one.name: {
            "unseen": one.unseen,
            "lengths": length_errors(one, relaxed),
            "bulk_modulus": percent(modulus, one.bulk_modulus_GPa),
        }
        for (one, relaxed), modulus in zip(done, moduli, strict=True)
    }
    return {
        "crystals": len(wanted),
        "not_converged": [one.name for one in wanted if one.name not in rows],
        "errors_percent": {
            "all": _summary(rows),
            "unseen": _summary({name: row for name, row in rows.items() if row["unseen"]}),
            "seen": _summary({name: row for name, row in rows.items() if not row["unseen"]}),
        },
        "crystal_errors_percent": rows,
    }


def common_crystals(data: Path) -> list[Reference]:
    """The crystals of the tables above, at their reference geometries."""
    states = {one.name: one for one in equations_of_state(data)}
    binaries = elastic_binaries(data)
    prototypes = prototype_binaries(data, binaries)
    return [
        *(
            replace(states[f"{symbol} {structure}"], name=f"{symbol} ({structure.lower()})")
            for structure, symbols in CUBIC_ELEMENTS.items()
            for symbol in symbols.split()
        ),
        *(ground_state(symbol) for symbol in OTHER_ELEMENTS.split()),
        *(
            replace(prototypes[f"{formula} {group}"], name=f"{formula} ({NAMES[group]})")
            for group, formulas in PROTOTYPES.items()
            for formula in formulas.split()
        ),
        *(replace(binaries[mp_id], name=name) for name, mp_id in OTHER_BINARIES.items()),
    ]


def length_errors(one: Reference, relaxed: Structures) -> dict[str, float]:
    """Errors in percent of the different lengths of the cell vectors, or of the mean length."""
    if one.volume_only:
        ratio = float(relaxed.volume / one.structure.volume)
        return {"a": percent(ratio ** (1 / 3), 1.0)}
    before, after = (torch.linalg.vector_norm(s.cell[0], dim=1) for s in (one.structure, relaxed))
    named = zip("abc", before.tolist(), after.tolist(), strict=True)
    different = {round(old, 3): (name, percent(new, old)) for name, old, new in reversed([*named])}
    return dict(reversed(different.values()))


def _summary(rows: dict[str, dict]) -> dict:
    lengths = {
        f"{name} {axis}": error
        for name, row in rows.items()
        for axis, error in row["lengths"].items()
    }
    moduli = {name: row["bulk_modulus"] for name, row in rows.items()}
    return {"lengths": spread(lengths), "bulk_modulus": spread(moduli)}
