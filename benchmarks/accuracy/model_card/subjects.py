"""What a card is made of: one of our models, or a published one through its ASE calculator.

The published ones come with their weights and run in an environment of their own:

    pip install torch==2.13.0 coset
    pip install --no-deps chgnet==0.4.2 nvidia-ml-py3
    pip install --no-deps sevenn==0.13.0 e3nn opt_einsum_fx torch_geometric
    pip install pymatgen cython braceexpand matscipy ninja opt_einsum pandas pyyaml requests
    pip install scikit-learn sympy tqdm aiohttp psutil pyparsing xxhash
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from ase.stress import full_3x3_to_voigt_6_stress

import coset
from coset.ase_interface import CalculatorPotential
from coset.catalog import load_model
from coset.loading import LoadSettings, potential_of
from coset.potential import Potential
from coset.structures import Properties, Structures, concatenate, properties_of, select
from coset.workflows.guards import evaluate_sound

BATCH = 64
Progress = Callable[[int, int], None]
"""Told how many of how many are done."""

ELEMENTS_OF_MPTRJ = frozenset(range(1, 84)) | frozenset(range(89, 95))
"""What both published models were trained on: without Po, At, Rn, Fr and Ra."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A potential to measure.

    potential: as users run it. precise: in float64, if it can be. shortened: evaluated one
    structure after the other, so that long sets are cut to their `shared` part. energy_zero:
    energies are on the uncorrected zero of the Materials Project.
    """

    name: str
    code: str
    parameters: int
    sha256: str
    potential: Potential
    precise: Potential
    shortened: bool = False
    energy_zero: bool = True

    def facts(self) -> dict[str, str | int]:
        """What identifies it in a file of results."""
        return {
            "name": self.name,
            "code": self.code,
            "parameters": self.parameters,
            "sha256": self.sha256,
        }

    def knows(self, one: Structures) -> bool:
        """Whether it was trained on every element of the structures."""
        return set(one.atomic_numbers.tolist()) <= self.potential.elements


def our_model(name: str) -> Subject:
    """The model in a file or directory, or of a catalog name."""
    checkpoint = load_model(name)
    return Subject(
        name=checkpoint.provenance.name,
        code=f"coset {coset.__version__}",
        parameters=sum(weights.numel() for weights in checkpoint.weights.values()),
        sha256=checkpoint.sha256,
        potential=potential_of(checkpoint, LoadSettings(device="cpu")),
        precise=potential_of(checkpoint, LoadSettings(device="cpu", dtype="float64")),
    )


def chgnet() -> Subject:
    """CHGNet 0.3.0. Its energies have the MP2020 corrections, so they are not compared.

    Reference: B. Deng et al., Nat. Mach. Intell. 5, 1031 (2023).
    """
    from chgnet.model import CHGNet, CHGNetCalculator  # noqa: PLC0415

    class VoigtCalculator(CHGNetCalculator):
        """Stress as six numbers, which ASE expects of a calculator."""

        def calculate(self, *arguments, **options) -> None:
            """Evaluate."""
            super().calculate(*arguments, **options)
            self.results["stress"] = full_3x3_to_voigt_6_stress(self.results["stress"])

    network = CHGNet.load(model_name="0.3.0", use_device="cpu", verbose=False)
    calculator = VoigtCalculator(network, use_device="cpu", on_isolated_atoms="ignore")
    potential = CalculatorPotential(calculator=calculator, cutoff=6.0, elements=ELEMENTS_OF_MPTRJ)
    return Subject(
        name="CHGNet 0.3.0",
        code=f"chgnet {version('chgnet')}",
        parameters=_count(network),
        sha256="",
        potential=potential,
        precise=potential,
        shortened=True,
        energy_zero=False,
    )


def sevennet() -> Subject:
    """SevenNet-0 (11 July 2024).

    Reference: Y. Park et al., J. Chem. Theory Comput. 20, 4857 (2024).
    """
    from sevenn.calculator import SevenNetCalculator  # noqa: PLC0415

    calculator = SevenNetCalculator("7net-0", device="cpu")
    potential = CalculatorPotential(calculator=calculator, cutoff=5.0, elements=ELEMENTS_OF_MPTRJ)
    return Subject(
        name="SevenNet-0",
        code=f"sevenn {version('sevenn')}",
        parameters=_count(calculator.model),
        sha256="",
        potential=potential,
        precise=potential,
        shortened=True,
    )


PUBLISHED = {"chgnet": chgnet, "sevennet": sevennet}


def evaluate_all(
    potential: Potential, singles: list[Structures], progress: Progress
) -> list[Properties | None]:
    """Properties of each structure, evaluated in batches; None where the potential fails."""
    results: list[Properties | None] = [None] * len(singles)
    for start in range(0, len(singles), BATCH):
        progress(start, len(singles))
        batch = concatenate(singles[start : start + BATCH])
        places, properties, _ = evaluate_sound(lambda batch, places: potential(batch), batch)
        sound = select(batch, torch.tensor(places, dtype=torch.int64))
        for row, place in enumerate(places):
            results[start + place] = properties_of(properties, sound, row)
    return results


def _count(network: torch.nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())
