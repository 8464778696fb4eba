"""The loop: a run of several stages that can be stopped and resumed to the last bit.

Read `train` downwards. Every step: make its micro-batches, add up the gradients of the loss, sum
them over ranks, clip, step, average the weights. What a step does depends on its number alone.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coset.errors import ConfigError
from coset.training.parallel import Ranks, connect, disconnect, discover, has_bfloat16, wait_for_all
from coset.training.prepare import prepare
from coset.training.run import Run
from coset.training.settings import StageSettings, TrainSettings
from coset.training.state import MODEL, latest_state, lock_run


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a progress bar shows."""

    step: int
    total: int
    stage: str
    loss: float
    lr: float
    atoms_per_second: float
    seconds_left: float
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOutcome:
    """How far a run came; metrics: of the last validation; model: the newest averaged weights."""

    finished: bool
    step: int
    directory: Path
    model: Path | None
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    settings: TrainSettings,
    *,
    resume: bool = True,
    max_seconds: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[StepReport], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TrainOutcome:
    """Train, or go on where the run in `settings.run.directory` stopped.

    Stops after the step in which `should_stop` turns true or `max_seconds` are over, on any rank;
    the state is saved then, every few minutes, and after every stage.

    Raises:
        ConfigError: code `RunExists` or `RunDiffers`, the directory holds a run that this is not.
        NotConvergedError: code `TrainingDiverged`, too many steps without a finite gradient.
    """
    deadline = time.monotonic() + max_seconds if max_seconds is not None else math.inf
    ranks = discover()
    device = torch.device("cuda", ranks.local) if torch.cuda.is_available() else torch.device("cpu")
    with ExitStack() as closing:
        if ranks.main:
            closing.enter_context(lock_run(Path(settings.run.directory)))
        connect(ranks, device)
        closing.callback(disconnect)
        run = _open_run(settings, ranks, device, say, resume=resume)
        closing.callback(run.close)
        speaker = _Speaker(run, report if ranks.main else None)
        while run.step < settings.steps:
            now = run.stretch()
            if run.step == now.first:
                run.begin_stage(now.stage)
            for step_batches in run.batches(now.last):
                stop = should_stop() or time.monotonic() > deadline
                stop = run.take_step(now, step_batches, stop=stop)
                speaker.after_step(now.stage)
                if run.must_validate(now.last):
                    speaker.validated(now.stage, run.validate(now.stage))
                if stop or run.must_save(now.last):
                    run.save(now.stage if run.step == now.last else None)
                if stop and run.step < settings.steps:
                    return _outcome(run, finished=False)
        return _outcome(run, finished=True)


def _open_run(
    settings: TrainSettings,
    ranks: Ranks,
    device: torch.device,
    say: Callable[[str], None],
    *,
    resume: bool,
) -> Run:
    directory = Path(settings.run.directory)
    if latest_state(directory) is not None and not resume:
        raise ConfigError(
            f"{directory} holds a run", code="RunExists", hint="--resume auto goes on with it"
        )
    slow = [stage.name for stage in settings.stages if stage.precision == "bfloat16"]
    if slow and ranks.main and not has_bfloat16(device):
        say(
            f"this processor has no bfloat16 arithmetic, which stage {', '.join(slow)} asks for: a "
            f"step takes about ten times longer than with --set stage.{slow[0]}.precision=float32"
        )
    prepared = prepare(settings, say) if ranks.main else None
    wait_for_all()
    return Run(settings, prepared or prepare(settings, lambda text: None), ranks, device)


def _outcome(run: Run, *, finished: bool) -> TrainOutcome:
    wait_for_all()
    latest = latest_state(run.directory)
    return TrainOutcome(
        finished=finished,
        step=run.step,
        directory=run.directory,
        model=None if latest is None else latest / MODEL,
        metrics=run.metrics,
    )


class _Speaker:
    """Turns steps into log lines and progress reports."""

    def __init__(self, run: Run, report: Callable[[StepReport], None] | None) -> None:
        self.run, self.report = run, report
        self._restart()

    def _restart(self) -> None:
        self.since, self.steps, self.atoms = time.monotonic(), 0, 0
        self.sums: dict[str, float] = {}

    def after_step(self, stage: StageSettings) -> None:
        run = self.run
        self.steps, self.atoms = self.steps + 1, self.atoms + run.atoms
        for name, value in run.terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if run.log is None or (run.step % run.settings.run.log_every and run.step != 1):
            return
        seconds = time.monotonic() - self.since
        means = {name: value / self.steps for name, value in self.sums.items()}
        loss, rate = sum(means.values()), self.atoms / seconds
        values = {"stage": stage.name, "loss": loss, **means, "lr": run.lr}
        values |= {"gradient_norm": run.gradient_norm, "atoms_per_second": rate}
        run.log.write("train", run.step, values)
        self._tell(stage, loss, rate, seconds / self.steps)
        self._restart()

    def validated(self, stage: StageSettings, metrics: dict[str, float]) -> None:
        parts = [f"{name} {1000.0 * value:.4g} m" for name, value in metrics.items()]
        self._tell(stage, float("nan"), float("nan"), 0.0, "; ".join(parts))
        self._restart()

    def _tell(
        self, stage: StageSettings, loss: float, rate: float, per_step: float, note: str = ""
    ) -> None:
        if self.report is None:
            return
        total = self.run.settings.steps
        self.report(
            StepReport(
                step=self.run.step,
                total=total,
                stage=stage.name,
                loss=loss,
                lr=self.run.lr,
                atoms_per_second=rate,
                seconds_left=(total - self.run.step) * per_step,
                note=note,
            )
        )
