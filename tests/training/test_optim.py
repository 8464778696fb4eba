"""Muon: what it takes for hidden, the polar factor, its share among ranks, and exact resume."""

from dataclasses import replace

import pytest
import torch
from factories import HYPERS
from test_loop import StopAfter, same_state
from torch import nn
from training_data import make_settings

from coset.pet.model import Pet
from coset.training import optim
from coset.training.loop import train
from coset.training.optim import Muon, Optimizer, hidden_matrices, orthogonalize
from coset.training.parallel import Ranks
from coset.training.settings import OptimizerSettings

ALONE = Ranks()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_the_step_is_near_the_polar_factor(shape, bfloat16, monkeypatch):
    monkeypatch.setattr(optim, "has_bfloat16", lambda device: bfloat16)
    torch.manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    singular = torch.linspace(0.05, 1.0, min(shape))
    found = orthogonalize((1e-4 * (left * singular) @ right.mT)[None])[0]
    inside = left.mT @ found @ right
    assert found.dtype == torch.float32
    assert 0.6 < inside.diagonal().min() <= inside.diagonal().max() < 1.3
    assert (inside - inside.diagonal().diag()).abs().max() < 0.05


def test_every_map_of_a_stacked_matrix_is_orthogonal_for_itself():
    torch.manual_seed(2)
    stacked = nn.Parameter(torch.zeros(32, 16))
    first, second = torch.randn(16, 16), torch.randn(16, 16)
    stacked.grad = torch.cat([first, 1e-3 * second])
    muon = Muon({stacked: 2}, ALONE, weight_decay=0.0)
    muon.param_groups[0]["lr"] = 0.5
    muon.step()
    singular = torch.linalg.svdvals(stacked.detach().reshape(2, 16, 16))
    # Of a plain step on the whole, the second map would have next to none.
    assert singular.median() > 0.5 * 0.2 * 4 * 0.6
    assert singular.max() < 0.5 * 0.2 * 4 * 1.3
    plain = nn.Parameter(torch.zeros(32, 16))
    plain.grad = stacked.grad
    whole = Muon({plain: 1}, ALONE, weight_decay=0.0)
    whole.param_groups[0]["lr"] = 0.5
    whole.step()
    assert torch.linalg.svdvals(plain.detach()[16:]).max() < 0.1 * singular.median()


def test_embeddings_heads_and_thin_matrices_stay_with_adamw():
    network = Pet(HYPERS, {})
    blocks = {name: hidden_matrices(network).get(p) for name, p in network.named_parameters()}
    for name, n in blocks.items():
        if name.startswith("gnn_layers") and name.endswith("input_linear.weight"):
            assert n == 3
        if "head" in name or "last" in name or "embed" in name or name.endswith("bias"):
            assert n is None
    assert any(n == 1 for n in blocks.values())
    wide = replace(HYPERS, network=replace(HYPERS.network, d_node=384))
    largest = {m: m.shape[0] // n for m, n in hidden_matrices(Pet(wide, {})).items()}
    assert max(min(rows, m.shape[1]) for m, rows in largest.items()) == 96
    optimizer = Optimizer(network, OptimizerSettings(name="muon"), ALONE)
    owned = [p for part in optimizer.parts for g in part.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned)) == len(list(network.parameters()))


def test_ranks_share_the_work(monkeypatch):
    monkeypatch.setattr(optim, "sum_over_ranks", lambda values: values)
    torch.manual_seed(3)
    matrices = [torch.randn(16, 24) for _ in range(3)]
    whole = Muon({nn.Parameter(matrices[0]): 1}, ALONE, 0.0)._orthogonalized(matrices)
    parts = [
        Muon({nn.Parameter(matrices[0]): 1}, Ranks(rank=k, world=2), 0.0)._orthogonalized(matrices)
        for k in range(2)
    ]
    assert (parts[0][1] == 0).all()
    assert (parts[1][::2] == 0).all()
    assert (sum(parts) - whole).abs().max() < 1e-2


def test_a_run_with_muon_goes_on_to_the_last_bit(tmp_path):
    settings = make_settings(tmp_path)
    settings = replace(settings, optimizer=replace(settings.optimizer, name="muon"))
    assert train(settings).finished
    stopped = replace(settings, run=replace(settings.run, directory=str(tmp_path / "stopped")))
    for steps in (2, 7):
        assert not train(stopped, should_stop=StopAfter(steps)).finished
    assert train(stopped).finished
    same_state(stopped, settings)
