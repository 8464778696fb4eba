"""The energy of a model of coset as a metatrain checkpoint, so that both codes evaluate one model.

Usage: python as_metatrain.py DIRECTORY_OF_MODEL OUT.ckpt, with a Python that has metatrain

The energies differ from the original's by the baseline, which is
left out, and by what metatrain does otherwise: ten steps of the solver of the adaptive cutoff, its
epsilons, no repulsion below the bonds. Direct heads are left out.
"""

import argparse
import json
from pathlib import Path

import torch
from metatrain.pet import PET
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info
from metatrain.utils.io import load_model
from omegaconf import OmegaConf
from safetensors.torch import load_file

PER_ELEMENT = ("edge_embedder.weight", "node_embedders.0.weight")


def hypers_of(config):
    """Hyperparameters of metatrain's PET for a network of ours with its default kinds of blocks."""
    network, cutoff = config["network"], config["cutoff"]
    kinds = ("normalization", "activation", "norm_placement", "featurizer")
    if [network[kind] for kind in kinds] != ["rms", "glu", "pre", "feedforward"]:
        raise ValueError("other blocks than RMSNorm, SwiGLU and pre-norm have other names")
    hypers = dict(get_default_hypers("pet")["model"])
    shared = ("d_pet", "d_node", "d_head", "d_feedforward", "attention_temperature")
    return hypers | {name: network[name] for name in shared} | {
        "num_heads": network["n_heads"],
        "num_gnn_layers": network["n_gnn_layers"],
        "num_attention_layers": network["n_attention_layers"],
        "cutoff": cutoff["cutoff"],
        "cutoff_width": cutoff["width"],
        "cutoff_width_adaptive": cutoff["adaptive_width"],
        "cutoff_function": cutoff["function"].capitalize(),
        "num_neighbors_adaptive": cutoff["n_neighbors"],
    }  # fmt: skip


def fill(model, weights, types, scale):
    """Copy the weights: elements in ascending order, the scale of the energy in the last layers."""
    order = [types.index(number) for number in sorted(types)]
    for name, parameter in model.state_dict().items():
        if not name.startswith("backend.") or name.endswith("species_to_species_index"):
            continue
        own = name.removeprefix("backend.").replace(".energy___0", "")
        values = weights[own].float()
        if own in PER_ELEMENT or own.endswith("neighbor_embedder.weight"):
            values = values[order]
        parameter.copy_(values * scale if "last_layers" in own else values)


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    manifest = json.loads((options.model / "manifest.json").read_text(encoding="utf-8"))
    types = manifest["atomic_types"]
    settings = OmegaConf.create({"unit": "eV", "quantity": "energy", "description": ""})
    targets = {"energy": get_energy_target_info("energy", settings)}
    info = DatasetInfo(length_unit="angstrom", atomic_types=sorted(types), targets=targets)
    model = PET(hypers_of(manifest["config"]), info)
    weights = load_file(options.model / "model.safetensors")
    fill(model, weights, types, manifest["scales"]["energy"])
    checkpoint = model.get_checkpoint() | {"best_epoch": 0, "epoch": 0}
    state = model.state_dict()
    checkpoint |= {"model_state_dict": state, "best_model_state_dict": state}
    torch.save(checkpoint, options.output)
    load_model(str(options.output))


if __name__ == "__main__":
    main()
