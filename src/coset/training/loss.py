"""The loss: predictions against labels in scaled units, averaged over the labels of a whole step.

    L = sum_t w_t [sum_k rho_t((y_k - y'_k)/s_t)] / (labels of kind t in the step)

Counts are those of the whole step, so micro-batches on several ranks add up to the exact mean, with
missing labels too. Energies and virials are per atom. rho is the Huber function of the norm of
the error (of its components if so set). Source of the recipe: arXiv 2601.16195 and its published
training options.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from coset.edge_model import (
    INDEXING,
    Outputs,
    averaged_network,
    edge_gradient,
    forces_and_virial,
)
from coset.pet.model import Pet
from coset.structures import atoms_of
from coset.training.batches import Batch, Counts
from coset.training.settings import LossSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """energy [S] without baseline, eV; forces [A, 3]; virial [S, 3, 3], eV; direct heads as such.

    direct_virial: the direct stress times the volume, its symmetric part.
    """

    energy: Float[Tensor, " systems"]
    forces: Float[Tensor, "atoms 3"] | None = None
    virial: Float[Tensor, "systems 3 3"] | None = None
    direct_forces: Float[Tensor, "atoms 3"] | None = None
    direct_virial: Float[Tensor, "systems 3 3"] | None = None


def predict(
    network: Pet, batch: Batch, settings: LossSettings, *, create_graph: bool = True
) -> Predictions:
    """Whatever the loss weighs; the gradient of the energy only if it is needed."""
    targets = network.hypers.targets_of
    outputs = Outputs(
        energy=targets("energy")[:1],
        direct_forces=targets("direct_forces")[0] if settings.direct_forces.weight else None,
        direct_stress=targets("direct_stress")[0] if settings.direct_stress.weight else None,
    )
    graph, vectors = batch.graph, batch.vectors
    forces = virial = None
    if settings.conservative:
        readout, gradient = edge_gradient(
            network, graph, vectors, batch.quadrature, outputs=outputs, create_graph=create_graph
        )
        forces, virial = forces_and_virial(vectors, gradient, graph)
        atomic = readout.atomic_energies
    else:
        with torch.no_grad():
            geometry = network.geometry(vectors, graph, INDEXING)
        kept = vectors.index_select(0, geometry.kept)
        readout = averaged_network(network, kept, geometry, INDEXING, outputs, batch.quadrature)
        atomic = readout.atomic_energies
        if geometry.energies is not None:
            atomic = atomic + geometry.energies
    direct = readout.direct_stress
    energy = atomic.new_zeros(len(batch.structures)).index_add(0, graph.system_index, atomic)
    return Predictions(
        energy=energy,
        forces=forces,
        virial=virial,
        direct_forces=readout.direct_forces,
        direct_virial=None if direct is None else 0.5 * (direct + direct.mT),
    )


def loss_terms(
    network: Pet, predictions: Predictions, batch: Batch, settings: LossSettings, counts: Counts
) -> dict[str, Float[Tensor, ""]]:
    """Weighted terms of the loss of one micro-batch; their sum is its part of the loss."""
    labels, structures = batch.labels, batch.structures
    assert labels.energy is not None
    assert labels.forces is not None
    assert labels.stress is not None
    n_atoms = structures.n_atoms.to(torch.float64)
    energy_scale = _scale(network, "energy")[0]
    per_atom = 1.0 / (n_atoms * energy_scale)
    volume = structures.volume.nan_to_num(1.0)  # where it is NaN the label is
    label_virial = labels.stress * volume[:, None, None]
    errors: dict[str, tuple[Tensor | None, int]] = {
        "energy": (
            (predictions.energy - labels.energy)[:, None] * per_atom[:, None],
            counts.energies,
        ),
        "forces": (_difference(predictions.forces, labels.forces, energy_scale), counts.atoms),
        "virial": (_per_system(predictions.virial, label_virial, per_atom), counts.stresses),
        "hessian": (_hessian(predictions, batch, settings, energy_scale), counts.pair_atoms),
    }
    if predictions.direct_forces is not None:
        species = network.species_of[structures.atomic_numbers]
        scale = _scale(network, "direct_forces")[species][:, None]
        error = _difference(predictions.direct_forces, labels.forces, scale)
        errors["direct_forces"] = (error, counts.atoms)
    if predictions.direct_virial is not None:
        factor = 1.0 / (volume * _scale(network, "direct_stress")[0])
        error = _per_system(predictions.direct_virial, label_virial, factor)
        errors["direct_stress"] = (error, counts.stresses)
    terms = {}
    for name, (error, count) in errors.items():
        term = getattr(settings, name)
        if term.weight and error is not None and count:
            terms[name] = term.weight * mean_huber(error, term.delta, count, settings.huber)
    return terms


def mean_huber(
    errors: Float[Tensor, "rows components"], delta: float, count: int, kind: str
) -> Float[Tensor, ""]:
    """Sum of the Huber function over rows (or components) that have a label, over `count` rows."""
    real = torch.isfinite(errors.detach()).all(1)
    known = errors[real]
    if kind == "component":
        return huber(known.square(), delta).sum() / (count * errors.shape[1])
    return huber(known.square().sum(1), delta).sum() / count


def huber(squares: Tensor, delta: float) -> Tensor:
    """x²/2 up to |x| = delta, then delta (|x| - delta/2), from x²; smooth at 0."""
    outer = squares.clamp_min(delta * delta).sqrt()
    return torch.where(squares < delta * delta, 0.5 * squares, delta * (outer - 0.5 * delta))


def _scale(network: Pet, quantity: str) -> Float[Tensor, " species"]:
    name = network.hypers.targets_of(quantity)[0]  # type: ignore[arg-type]
    return network.scales[name]


def _difference(
    predicted: Tensor | None, label: Tensor, scale: Tensor
) -> Float[Tensor, "atoms 3"] | None:
    return None if predicted is None else (predicted - label) / scale


def _per_system(
    predicted: Tensor | None, label: Tensor, factor: Tensor
) -> Float[Tensor, "systems 9"] | None:
    if predicted is None:
        return None
    return ((predicted - label) * factor[:, None, None]).reshape(-1, 9)


def _hessian(
    predictions: Predictions, batch: Batch, settings: LossSettings, scale: Tensor
) -> Float[Tensor, "atoms 3"] | None:
    """Error of (F(x + hu) - F(x - hu))/2h, per Å, for the displaced pairs of the batch.

    h u is read from the positions; u is a unit vector of all coordinates of the structure.
    """
    if not settings.hessian.weight or predictions.forces is None or not len(batch.pairs):
        return None
    assert batch.labels.forces is not None
    error = (predictions.forces - batch.labels.forces) / scale
    plus, _ = atoms_of(batch.structures, batch.pairs[:, 0])
    minus, pair = atoms_of(batch.structures, batch.pairs[:, 1])
    shift = batch.structures.positions[plus] - batch.structures.positions[minus]
    length = shift.new_zeros(len(batch.pairs)).index_add(0, pair, shift.square().sum(1)).sqrt()
    return (error[plus] - error[minus]) / length[pair][:, None]
