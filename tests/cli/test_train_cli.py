"""coset train and coset plan: exit codes, signals, what is said, and what a plan counts."""

import io
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import coset.training.loop
from coset.cli.train import seconds_of, store_size
from coset.data.store import Frames, StoreWriter
from coset.errors import ConfigError
from coset.pet.hypers import CutoffHypers, NetworkHypers, PetHypers, Target
from coset.training.loop import StepReport, TrainOutcome
from coset.training.parallel import is_main
from coset.training.plan import forward_flop_per_atom, kept_neighbors, matmul_flop_per_s
from tests.cli.test_cli import document, run

CONFIG = """
[run]
directory = "run"
[[data.train]]
path = "big"
share = 3
[[data.train]]
path = "small"
[model]
elements = "1-8"
targets = ["energy", "direct_forces"]
[model.network]
d_pet = 32
d_node = 128
d_head = 32
d_feedforward = 64
[batch]
structures = 8
[[stage]]
name = "direct"
steps = 30
lr = 1e-3
loss = { energy = { weight = 1 }, direct_forces = { weight = 1 } }
[[stage]]
name = "conservative"
steps = 10
lr = 1e-3
loss = { forces = { weight = 1 } }
"""


def write_store(path: Path, n_atoms: list[int]) -> None:
    """Structures of hydrogen without labels."""
    frames, total = len(n_atoms), sum(n_atoms)
    missing = {"forces": (total, 3), "stress": (frames, 3, 3), "energy": frames}
    ones = {name: np.ones(frames, int) for name in ("unit", "formula_hash", "spin_multiplicity")}
    writer = StoreWriter(path, kinds=["k"], facts={})
    writer.append(
        Frames(
            n_atoms=np.array(n_atoms),
            numbers=np.ones(total, np.uint8),
            positions=np.zeros((total, 3)),
            cell=np.zeros((frames, 3, 3)),
            pbc=np.zeros((frames, 3), bool),
            atomic_energies=np.full(total, np.nan),
            charge=np.zeros(frames, int),
            kind=np.zeros(frames, int),
            **{name: np.full(shape, np.nan) for name, shape in missing.items()},
            **ones,
        )
    )
    writer.finish()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def stored(folder) -> Path:
    write_store(folder / "big", [2, 2, 2, 6])
    write_store(folder / "small", [5])
    return folder


# coset plan


def published(d: int, layers: int, attention: int, kept: float, n_targets: int) -> float:
    """Multiply-adds of the published family (d_node 4 d, d_feedforward 2 d, d_head d), twice."""
    tokens = kept + 1
    block = 4 * d * d * tokens + 6 * d * d * kept + 2 * d * tokens**2 + 104 * d * d
    embedding = (4 * d + 3 * d * d) * kept + (layers - 1) * (4 * d + 4 * d * d) * kept
    heads = n_targets * (5 * d * d + 2 * d * d * kept)
    return 2 * (layers * attention * block + embedding + 6 * d * d * kept * layers + heads)


@pytest.mark.parametrize(
    ("d", "layers", "attention", "kept"), [(64, 2, 1, 12.0), (128, 2, 1, 8.0), (384, 3, 2, 36.0)]
)
def test_operations_follow_the_formula(d, layers, attention, kept):
    network = NetworkHypers(
        d_pet=d,
        d_node=4 * d,
        d_head=d,
        d_feedforward=2 * d,
        n_gnn_layers=layers,
        n_attention_layers=attention,
    )
    targets = tuple(Target(name=q, quantity=q) for q in ("energy", "direct_forces"))
    hypers = PetHypers(atomic_types=(1, 6, 8), targets=targets, network=network)
    found = forward_flop_per_atom(hypers, kept)
    # The formula leaves out the last layers of the heads: (1 + 3) d (kept + 1) products.
    assert found - published(d, layers, attention, kept, 2) == 8.0 * d * (kept + 1)


def test_embeddings_cost_nothing():
    target = (Target(name="energy", quantity="energy"),)
    few = PetHypers(atomic_types=(1,), targets=target)
    many = PetHypers(atomic_types=tuple(range(1, 90)), targets=target)
    assert forward_flop_per_atom(few, 10.0) == forward_flop_per_atom(many, 10.0)


def test_kept_neighbors():
    assert kept_neighbors(CutoffHypers(cutoff=7.5, n_neighbors=16.0)) == 24.0
    fixed = CutoffHypers(cutoff=6.0, adaptive="fixed", n_neighbors=None)
    assert kept_neighbors(fixed) == pytest.approx(39.8, abs=0.1)
    assert kept_neighbors(CutoffHypers(cutoff=6.0, n_neighbors=90.0)) == kept_neighbors(fixed)


def test_the_measured_rate_is_one():
    rate = matmul_flop_per_s(NetworkHypers(d_pet=32), torch.device("cpu"), seconds=0.01)
    assert 1e7 < rate < 1e15


def test_plan_counts(stored):
    result = run("plan", "run.toml", "--json", cwd=stored)
    assert result.returncode == 0, result.stderr
    found = document(result)
    assert found["command"] == "plan"
    assert found["settings"]["batch"]["structures"] == 8
    (plan,) = found["results"]
    assert plan["memory_bytes"] == 20 * plan["parameters"]
    assert [(s["name"], s["steps"], s["structures"]) for s in plan["stages"]] == [
        ("direct", 30, 240),
        ("conservative", 10, 80),
    ]
    assert (plan["steps"], plan["structures"]) == (40, 320)
    assert plan["passes"] == [320 * 0.75 / 4, 320 * 0.25]
    assert plan["atoms_per_structure"] == 0.75 * 3 + 0.25 * 5
    # Per structure a conservative step costs twice a direct one.
    direct, conservative = (stage["hours"] for stage in plan["stages"])
    assert direct == pytest.approx(conservative * 30 / 10 / 2)
    assert plan["hours"] == pytest.approx(direct + conservative)
    seconds = 240 * plan["atoms_per_structure"] * plan["forward_flop_per_atom"] * 3
    assert direct * 3600 == pytest.approx(2 * seconds / plan["flop_per_s"])
    assert plan["train"][0] == {
        "path": str(stored / "big"),
        "structures": 4,
        "atoms": 12,
        "bytes": sum(file.stat().st_size for file in (stored / "big").glob("shard*")),
        "problem": "",
    }


def test_plan_in_words(stored):
    result = run("plan", "run.toml", "--set", "stage.direct.steps=1000", cwd=stored)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    for words in ("parameters", "8,000", "estimate", "conservative", "big", "passes"):
        assert words in result.stderr


def test_plan_without_data(folder):
    (folder / "small").mkdir()
    (folder / "small" / "manifest.json").write_text("[1]")
    result = run("plan", "run.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert f"{folder / 'big'}: no manifest.json (No such file or directory)" in result.stderr
    assert f"{folder / 'small'}: manifest.json is not that of a store" in result.stderr
    (plan,) = document(run("plan", "run.toml", "--json", cwd=folder))["results"]
    assert plan["hours"] is None
    assert plan["passes"] == [None, None]


@pytest.mark.parametrize("text", ["{}", '{"structures": 1, "atoms": 1, "files": [1]}', "nonsense"])
def test_foreign_manifests(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert store_size(str(tmp_path)).problem


# coset train


@pytest.fixture
def trained(monkeypatch):
    """Replaces the loop by one that calls `during` and stops when asked; keeps its arguments."""
    calls: dict = {"during": lambda report: None, "finished": True}

    def train(settings, *, resume, max_seconds, should_stop, report, say):
        calls.update(settings=settings, resume=resume, max_seconds=max_seconds)
        if is_main():
            say("one word")
        calls["during"](report)
        stopped = should_stop() or not calls["finished"]
        return TrainOutcome(
            finished=not stopped,
            step=12 if stopped else settings.steps,
            directory=Path(settings.run.directory),
            model=None if stopped else Path("run/model"),
            metrics={"energy_mae": 0.0125},
        )

    monkeypatch.setattr(coset.training.loop, "train", train)
    return calls


def report_at(step: int, note: str = "") -> StepReport:
    return StepReport(
        step=step,
        total=40,
        stage="direct",
        loss=0.25,
        lr=1e-3,
        atoms_per_second=1234.5,
        seconds_left=3723.0 if step else math.nan,
        note=note,
    )


def test_a_finished_run_says_where_everything_is(folder, trained):
    result = run("train", "run.toml", "--max-time", "2h30m", "--threads", "1", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    expected = ("training model", "direct 30", "one word", "energy_mae = 0.0125", "metrics.jsonl")
    for words in (*expected, "model: run/model", "finished after 40 steps"):
        assert words in result.stderr
    assert trained["resume"] is True
    assert trained["max_seconds"] == 9000.0
    assert trained["settings"].steps == 40


def test_train_in_json(folder, trained):
    trained["finished"] = False
    result = run("train", "run.toml", "--json", "--resume", "never", cwd=folder)
    assert result.returncode == 75
    found = document(result)
    assert set(found) == {"coset", "command", "settings", "results"}
    assert found["results"] == [
        {
            "finished": False,
            "step": 12,
            "steps": 40,
            "directory": "run",
            "model": None,
            "metrics": {"energy_mae": 0.0125},
        }
    ]
    assert "the same command goes on" in result.stderr
    assert trained["resume"] is False
    assert trained["max_seconds"] is None


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGINT], 130),
        # A batch system warns first and terminates later: the state is being saved then.
        ([signal.SIGUSR1, signal.SIGTERM], 75),
    ],
)
def test_signals_stop_after_the_step(folder, trained, signals, code):
    before = [signal.getsignal(number) for number in signals]
    trained["during"] = lambda report: [os.kill(os.getpid(), number) for number in signals]
    result = run("train", "run.toml", cwd=folder)
    assert result.returncode == code
    assert "stopping after this step" in result.stderr
    assert "stopped and saved after 12 of 40 steps" in result.stderr
    assert [signal.getsignal(number) for number in signals] == before


def test_a_signal_in_the_last_step_changes_nothing(folder, trained, monkeypatch):
    outcome = TrainOutcome(finished=True, step=40, directory=folder, model=folder / "model")

    def train(settings, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    monkeypatch.setattr(coset.training.loop, "train", train)
    assert run("train", "run.toml", cwd=folder).returncode == 0


def test_plain_progress_is_sparse(folder, trained):
    def during(report):
        for step in range(39):
            report(report_at(step, "validation: 12.3 meV/atom" if step == 20 else ""))
        report(report_at(40))

    trained["during"] = during
    lines = run("train", "run.toml", cwd=folder).stderr.splitlines()
    assert [line for line in lines if line.startswith("step ")] == [
        "step 0/40 direct: loss 0.25, lr 0.001, 1,234 atoms/s, ? left",
        "step 20/40 direct: validation: 12.3 meV/atom",
        "step 40/40 direct: loss 0.25, lr 0.001, 1,234 atoms/s, 1:02:03 left",
    ]


def test_a_bar_on_a_terminal(folder, trained, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=160, markup=False)
    monkeypatch.setattr(sys.modules["coset.cli.train"], "console", screen)
    trained["during"] = lambda report: [
        report(report_at(20)),
        report(report_at(20, "validation: [1] meV/atom")),
    ]
    assert run("train", "run.toml", cwd=folder).returncode == 0
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.file.getvalue())
    assert "step 20: validation: [1] meV/atom" in shown
    assert re.search(r"direct .* 20/40 loss 0.25, lr 0.001, 1,234 atoms/s, 1:02:03 left", shown)


def test_only_the_first_rank_speaks(folder, trained, monkeypatch):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    trained["during"] = lambda report: os.kill(os.getpid(), signal.SIGTERM)
    result = run("train", "run.toml", "--json", cwd=folder)
    assert result.returncode == 75
    assert result.stdout == ""
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_wrong_file_is_wrong_usage(folder, trained, command):
    result = run(command, "run.toml", "--set", "run.sed=1", "--json", cwd=folder)
    assert result.returncode == 2
    assert "unknown key 'run.sed'; did you mean 'seed'?" in result.stderr
    assert document(result)["error"]["code"] == "ConfigError"
    missing = run(command, "missing.toml", cwd=folder)
    assert missing.returncode == 2
    assert "missing.toml cannot be read" in missing.stderr


def test_a_wrong_time_is_wrong_usage(folder, trained):
    result = run("train", "run.toml", "--max-time", "soon", cwd=folder)
    assert result.returncode == 2
    assert "2h30m" in result.stderr
    assert "settings" not in trained


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h30m", 9000.0), ("90m", 5400.0), ("45s", 45.0), ("1d12h", 129_600.0), ("0.5h", 1800.0)],
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "2h 30m", "2:30", "h", "-1h", "1w", "2h30"])
def test_no_times(text):
    with pytest.raises(ConfigError, match="--max-time"):
        seconds_of(text)
