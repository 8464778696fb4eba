import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import close
from training_data import CONSERVATIVE, DIRECT, make_settings, make_store

from coset.checkpoint import load_checkpoint
from coset.data.geometry import structures_of
from coset.data.store import Store
from coset.errors import CheckpointError, ConfigError, NotConvergedError
from coset.loading import LoadSettings, potential_of
from coset.training import loop
from coset.training import run as run_module
from coset.training.batches import make_batch
from coset.training.loop import train
from coset.training.parallel import Ranks
from coset.training.prepare import _not_default, digest_of, prepare
from coset.training.run import Run
from coset.training.settings import RunSettings, StoreShare
from coset.training.state import latest_state, lock_run

STEPS = 15


def state_files(settings):
    path = latest_state(Path(settings.run.directory))
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "model.zip"}


def averaged(settings):
    return load_checkpoint(latest_state(Path(settings.run.directory)) / "model.zip").weights


def losses(settings):
    lines = (Path(settings.run.directory) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["kind"], r.get("loss", r.get("valid.forces_mae"))) for r in records]


def same_state(one, two):
    a, b = state_files(one), state_files(two)
    assert a["weights.safetensors"] == b["weights.safetensors"]
    assert a["optimizer.safetensors"] == b["optimizer.safetensors"]
    assert json.loads(a["state.json"])["step"] == json.loads(b["state.json"])["step"]
    weights, others = averaged(one), averaged(two)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert losses(one) == losses(two)


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left <= 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    settings = make_settings(folder)
    outcome = train(settings)
    assert outcome.finished
    assert outcome.step == STEPS == settings.steps
    return settings


@pytest.mark.parametrize("stops", [(1,), (6,), (8, 1, 4), (14,)])
def test_a_stopped_run_goes_on_to_the_last_bit(straight, tmp_path, stops):
    own = replace(straight.run, directory=str(tmp_path / "run"))
    settings = replace(straight, run=own)
    for steps in stops:
        outcome = train(settings, should_stop=StopAfter(steps))
        assert not outcome.finished
    assert train(settings).finished
    same_state(settings, straight)


def test_what_was_written_after_the_last_checkpoint_is_repeated(straight, tmp_path, monkeypatch):
    own = replace(straight.run, directory=str(tmp_path / "run"), checkpoint_minutes=1e6)
    settings = replace(straight, run=own)
    train(settings, should_stop=StopAfter(3))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "must_validate", lambda run, last: run.step == 5 and killed())
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    with (Path(own.directory) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert train(settings).finished
    same_state(settings, straight)


def test_a_finished_run_is_left_alone(straight):
    before = state_files(straight)
    assert train(straight).finished
    assert state_files(straight) == before


@pytest.mark.parametrize("bfloat16", [False, True])
def test_emulated_bfloat16_is_told(straight, tmp_path, monkeypatch, bfloat16):
    monkeypatch.setattr(loop, "has_bfloat16", lambda device: bfloat16)
    first = replace(straight.stages[0], precision="bfloat16")
    run = replace(straight.run, directory=str(tmp_path / "run"))
    said = []
    train(
        replace(straight, run=run, stages=(first, *straight.stages[1:])),
        max_seconds=0.0,
        say=said.append,
    )
    assert any(f"stage.{first.name}.precision=float32" in text for text in said) != bfloat16


def test_time_is_up_after_the_step(straight, tmp_path):
    settings = replace(straight, run=replace(straight.run, directory=str(tmp_path / "run")))
    outcome = train(settings, max_seconds=0.0)
    assert (outcome.finished, outcome.step) == (False, 1)


def test_only_the_last_checkpoints_are_kept(straight, tmp_path):
    own = replace(straight.run, directory=str(tmp_path / "r"), checkpoint_minutes=0.0, keep=2)
    settings = replace(straight, run=own)
    train(settings, should_stop=StopAfter(5))
    names = sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir())
    assert names == ["step-000000004", "step-000000005"]


def test_other_settings_or_data_are_refused(straight, tmp_path):
    other = replace(straight, optimizer=replace(straight.optimizer, clip=0.5))
    with pytest.raises(ConfigError, match="other settings") as error:
        train(other)
    assert error.value.code == "RunDiffers"
    store = make_store(tmp_path / "store", seed=50)
    share = replace(straight.data.train[0], path=str(store))
    with pytest.raises(ConfigError, match="other training data"):
        train(replace(straight, data=replace(straight.data, train=(share,))))
    with pytest.raises(ConfigError, match="holds a run"):
        train(straight, resume=False)


def test_a_run_may_begin_with_a_model(straight, tmp_path):
    """A step with rate 0 leaves the model as it is, baseline and scales too; another is refused."""
    start = Path(straight.run.directory) / "models" / "direct"
    still = replace(straight.stages[1], steps=1, lr=0.0, final_lr=0.0)
    settings = replace(
        straight,
        start=str(start),
        stages=(still,),
        data=replace(straight.data, train=(StoreShare(path=straight.data.valid[0]),)),
        run=replace(straight.run, directory=str(tmp_path / "run")),
        optimizer=replace(straight.optimizer, weight_decay=0.0),
    )
    outcome = train(settings)
    before, after = load_checkpoint(start), load_checkpoint(outcome.model)
    assert before.baseline == after.baseline
    assert before.scales == after.scales
    assert all(torch.equal(w, after.weights[name]) for name, w in before.weights.items())
    other = replace(settings, model=replace(settings.model, zbl=0.5))
    with pytest.raises(ConfigError, match="another network"):
        train(replace(other, run=replace(other.run, directory=str(tmp_path / "other"))))


def test_settings_born_later_do_not_change_the_digest(straight):
    assert digest_of(straight) == digest_of(
        replace(straight, batch=replace(straight.batch, window=4), start="")
    )
    assert digest_of(straight) != digest_of(replace(straight, start="model"))
    assert "clip" not in json.dumps(_not_default(straight.optimizer))
    assert _not_default(replace(straight.optimizer, clip=2.0)) == {"clip": 2.0}


def test_a_damaged_checkpoint_is_refused(straight, tmp_path):
    settings = replace(straight, run=replace(straight.run, directory=str(tmp_path / "run")))
    train(settings, should_stop=StopAfter(2))
    weights = latest_state(tmp_path / "run") / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256") as error:
        train(settings)
    assert error.value.code == "RunCorrupt"


def test_the_model_of_a_stage_predicts_what_was_validated(straight):
    path = Path(straight.run.directory) / "models" / "finish"
    potential = potential_of(load_checkpoint(path), LoadSettings(dtype="float32"))
    valid = Store(straight.data.valid[0])
    frames = valid.read(np.arange(len(valid)))
    found = potential(structures_of(frames))
    error = (found.forces - torch.from_numpy(frames.forces)).abs().mean()
    last = [x for x in losses(straight) if x[1] == "valid"][-1]
    assert last[0] == STEPS
    assert abs(float(error) - last[2]) < 1e-6


def test_a_run_belongs_to_one_process(straight):
    lock, busy = lock_run(Path(straight.run.directory)), pytest.raises(ConfigError, match="another")
    with lock, busy as error:
        train(straight)
    assert error.value.code == "RunBusy"


def make_run(settings, tmp_path):
    settings = replace(settings, run=replace(settings.run, directory=str(tmp_path / "fresh")))
    cpu = torch.device("cpu")
    run = Run(settings, prepare(settings, lambda text: None), Ranks(), cpu)
    run.close()
    return run


def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(straight, tmp_path):
    """Two parts of a step, with labels missing in one, are the mean over the whole step."""
    run = make_run(straight, tmp_path)
    run.network.double()
    parts = next(iter(run._micro_batches(1)))
    joined = run_module.MicroBatch(
        **{n: np.concatenate([getattr(p, n) for p in parts]) for n in ("store", "row", "slot")}
    )
    counts = run_module.count_labels(run.prepared.train, parts)
    assert counts == run_module.count_labels(run.prepared.train, [joined])
    totals = []
    for group in (parts, [joined]):
        run.network.zero_grad()
        for micro in group:
            baseline = run.prepared.statistics.baseline
            batch = make_batch(run.prepared.train, micro, baseline, seed=3)
            predictions = run_module.predict(run.network, batch, CONSERVATIVE)
            terms = run_module.loss_terms(run.network, predictions, batch, CONSERVATIVE, counts)
            assert set(terms) >= {"energy", "forces", "virial", "direct_forces"}
            sum(terms.values()).backward()
        totals.append([p.grad.clone() for p in run.network.parameters()])
    scale = max(float(g.abs().max()) for g in totals[0])
    for a, b in zip(*totals, strict=True):
        close(a / scale, b / scale, 1e-12)


def test_steps_without_a_finite_gradient_are_skipped_and_three_in_a_row_end_the_run(
    straight, tmp_path, monkeypatch
):
    settings = replace(straight, run=replace(straight.run, directory=str(tmp_path / "run")))
    true_terms, bad = run_module.loss_terms, {2}
    steps = []

    def broken(network, predictions, batch, loss, counts):
        steps.append(batch.names)
        terms = true_terms(network, predictions, batch, loss, counts)
        if (len(steps) - 1) // 2 in bad:
            terms["direct_forces"] = terms["direct_forces"] * torch.inf
        return terms

    monkeypatch.setattr(run_module, "loss_terms", broken)
    train(settings, should_stop=StopAfter(5))
    state = json.loads(state_files(settings)["state.json"])
    assert state["skipped"] == [2]
    skipped = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    names = [r["records"] for r in skipped if r["kind"] == "skipped"]
    assert names == [steps[4:6]]
    assert all(bool(w.isfinite().all()) for w in averaged(settings).values())
    steps.clear()
    bad.update(range(20))
    with pytest.raises(NotConvergedError, match="not finite") as error:
        train(settings)
    assert error.value.code == "TrainingDiverged"


def test_micro_batches_must_be_dealt_evenly(straight):
    with pytest.raises(ConfigError, match=r"2 micro-batches.*3 ranks"):
        Run(
            straight,
            prepare(straight, lambda text: None),
            Ranks(world=3),
            torch.device("cpu"),
        )


def command(settings, ranks):
    """A process that trains with these settings, on so many ranks."""
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from training_data import make_settings\n"
        "from coset.training.loop import train\n"
        "import signal\n"
        "stop = []\n"
        "signal.signal(signal.SIGTERM, lambda *a: stop.append(1))\n"
        "s = make_settings(Path(sys.argv[1]), directory=sys.argv[2], checkpoint_minutes=0.0)\n"
        "say = lambda r: print(r.step, flush=True)\n"
        "out = train(s, should_stop=lambda: bool(stop), report=say)\n"
        "sys.exit(0 if out.finished else 75)\n"
    )
    file = Path(settings.run.directory).parent / "train.py"
    file.write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launch = launch if ranks > 1 else [sys.executable]
    folder = Path(settings.data.train[0].path).parent
    here = Path(__file__).parent
    extra = [str(here), str(here.parent)]
    return [*launch, str(file), str(folder), settings.run.directory, *extra]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills_change_nothing(tmp_path, ranks):
    settings = make_settings(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(settings, ranks), check=True, env=environment, capture_output=True)
    killed = replace(settings, run=replace(settings.run, directory=str(tmp_path / "killed")))
    random = np.random.default_rng(0)
    kills = 0
    while kills < 10:
        number = signal.SIGKILL if kills % 2 else signal.SIGTERM
        with subprocess.Popen(
            command(killed, ranks),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as process:
            wanted = int(random.integers(1, 3))
            for seen, _ in enumerate(process.stdout, start=1):
                if seen == wanted:
                    os.killpg(process.pid, number)
                    break
        kills += 1
        assert process.returncode != 0
    subprocess.run(command(killed, ranks), check=True, env=environment, capture_output=True)
    same_state(killed, settings)


def test_two_ranks_are_one_rank_with_both_parts(straight, tmp_path):
    settings = replace(straight, run=RunSettings(directory=str(tmp_path / "two")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(settings, 2), check=True, env=environment, capture_output=True)
    one, two = averaged(straight), averaged(settings)
    for name, weights in one.items():
        close(weights, two[name], 1e-5)
    for (*place, a), (*same_place, b) in zip(losses(straight), losses(settings), strict=True):
        assert place == same_place
        assert abs(a - b) < 1e-6 * max(abs(a), 1.0)


def test_losses_fall(straight):
    direct = [x[2] for x in losses(straight) if x[1] == "train"][:6]
    assert np.mean(direct[-2:]) < np.mean(direct[:2])
    assert DIRECT.weights()["direct_forces"] == 1.0
