"""A run: weights, averaged weights and optimizer, and what may be done with them.

What a step does depends on its number alone: batches, rotations and the learning rate are functions
of it, so a run that goes on from a checkpoint repeats what it would have done.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from coset.checkpoint import Checkpoint, save_checkpoint
from coset.data.batching import MicroBatch
from coset.errors import ConfigError, NotConvergedError
from coset.pet.model import Pet
from coset.training.batches import Batch, Counts, count_labels, make_batch
from coset.training.log import MetricsLog
from coset.training.loss import loss_terms, predict
from coset.training.optim import AveragedWeights, Optimizer, learning_rate
from coset.training.parallel import Ranks, sum_gradients
from coset.training.prepare import Prepared, checkpoint_of, scales_of
from coset.training.settings import StageSettings, TrainSettings
from coset.training.state import Facts, latest_state, load_state, save_state
from coset.training.validation import score, validate

MAX_SKIPPED_IN_A_ROW = 3
MAX_SKIPPED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A stage within the run: its first step, the one after its last, and the last fresh start."""

    stage: StageSettings
    first: int
    last: int
    origin: int


class Run:
    """Weights, averaged weights and optimizer of a run, and what may be done with them."""

    def __init__(
        self, settings: TrainSettings, prepared: Prepared, ranks: Ranks, device: torch.device
    ) -> None:
        """Fresh weights from the seed, or the state of the newest checkpoint."""
        if settings.batch.micro_batches % ranks.world:
            raise ConfigError(
                f"{settings.batch.micro_batches} micro-batches cannot be dealt to {ranks.world} "
                "ranks",
                field="batch.micro_batches",
                hint="make it a multiple of the number of ranks",
            )
        self.settings, self.prepared, self.ranks, self.device = settings, prepared, ranks, device
        self.directory = Path(settings.run.directory)
        torch.manual_seed(settings.run.seed)
        scales = scales_of(prepared.statistics, settings.model)
        self.network = Pet(settings.model, scales)
        if prepared.start is not None:
            self.network.load_state_dict(dict(prepared.start))
        self.network = self.network.to(device)
        self.parameters: list[Tensor] = list(self.network.parameters())
        self.optimizer = Optimizer(self.network, settings.optimizer, ranks)
        self.averaged = AveragedWeights(self.parameters, settings.optimizer.ema)
        self.step, self.best = 0, float("inf")
        self.skipped: list[int] = []
        self.metrics: dict[str, float] = {}
        self.terms: dict[str, float] = {}
        self.atoms, self.gradient_norm, self.lr = 0, 0.0, 0.0
        if path := latest_state(self.directory):
            self._restore(path)
        self.saved_at = time.monotonic()
        self.log = MetricsLog(self.directory, self.step) if ranks.main else None

    def _restore(self, path: Path) -> None:
        facts, averaged = load_state(path, self.network, self.optimizer)
        if (facts.run, facts.data) != (self.prepared.run_digest, self.prepared.data_digest):
            what = "settings" if facts.run != self.prepared.run_digest else "training data"
            raise ConfigError(
                f"{self.directory} holds a run with other {what}",
                code="RunDiffers",
                field="run.directory",
                hint="choose another directory, or go back to what it was started with",
            )
        self.step, self.best, self.skipped = facts.step, facts.best, list(facts.skipped)
        self.metrics = dict(facts.metrics)
        names = [name for name, _ in self.network.named_parameters()]
        self.averaged.values = [averaged[name].to(self.device) for name in names]

    def stretch(self) -> "Stretch":
        """The stage of the next step."""
        first = origin = 0
        for stage in self.settings.stages:
            origin = origin if stage.continues else first
            last = first + stage.steps
            if self.step < last:
                return Stretch(stage=stage, first=first, last=last, origin=origin)
            first = last
        raise AssertionError("the run is finished")

    def begin_stage(self, stage: StageSettings) -> None:
        """Averaged weights become the weights and the optimizer forgets, unless it continues."""
        self.best = float("inf")
        if not stage.continues:
            self.optimizer.forget()
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.averaged.values)

    def batches(self, last: int) -> Iterator[tuple[list[Batch], Counts]]:
        """This rank's batches of every step up to `last`, made one step ahead."""
        with ThreadPoolExecutor(1) as ahead:
            steps = self._micro_batches(last)
            pending = [ahead.submit(self._load, step) for step in islice(steps, 1)]
            while pending:
                ready = pending.pop().result()
                pending = [ahead.submit(self._load, step) for step in islice(steps, 1)]
                yield ready

    def _micro_batches(self, last: int) -> Iterator[list[MicroBatch]]:
        plan = self.prepared.plan
        window, steps = -1, []
        for step in range(self.step, last):
            if step // plan.window != window:
                window = step // plan.window
                steps = plan.window_of(window)
            yield steps[step % plan.window]

    def _load(self, step: list[MicroBatch]) -> tuple[list[Batch], Counts]:
        sources, seed = self.prepared.train, self.settings.run.seed
        baseline = self.prepared.statistics.baseline
        own = step[self.ranks.rank :: self.ranks.world]
        batches = [make_batch(sources, micro, baseline, seed).to(self.device) for micro in own]
        return batches, count_labels(sources, step)

    def take_step(self, now: "Stretch", made: tuple[list[Batch], Counts], *, stop: bool) -> bool:
        """One optimizer step; whether any rank wants to stop."""
        (batches, counts), stage = made, now.stage
        trained = self._trained(stage)
        for parameter in self.parameters:
            parameter.grad = None
        names = list(stage.loss.weights())
        sums = torch.zeros(len(names) + 2, dtype=torch.float64)
        for batch in batches:
            with _precision(stage, self.device):
                predictions = predict(self.network, batch, stage.loss)
            terms = loss_terms(self.network, predictions, batch, stage.loss, counts)
            if terms:
                torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            for name, term in terms.items():
                sums[names.index(name)] += float(term.detach())
            sums[-2] += len(batch.structures.atomic_numbers)
        sums[-1] = float(stop)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sums = sum_gradients(trained, sums)
        self.terms = dict(zip(names, sums.tolist(), strict=False))
        self.atoms = int(sums[-2])
        norm = torch.nn.utils.clip_grad_norm_(trained, self.settings.optimizer.clip)
        self.gradient_norm = float(norm)
        self.lr = learning_rate(stage, self.step - now.first)
        if torch.isfinite(norm):
            self.optimizer.step(self.lr)
            self.averaged.update(self.parameters, self.step - now.origin)
        else:
            self._skip([batch.names for batch in batches])
        self.step += 1
        return bool(sums[-1] > 0)

    def _trained(self, stage: StageSettings) -> list[Tensor]:
        """Parameters that the loss of a stage reaches: the trunk and the heads that it weighs."""
        weights = stage.loss.weights()
        energy = weights.keys() & {"energy", "forces", "virial", "hessian"}
        used = [t.name for t in self.settings.model.targets if t.quantity in weights]
        used += self.settings.model.targets_of("energy") if energy else ()
        trained: list[Tensor] = []
        for name, parameter in self.network.named_parameters():
            parts = name.split(".")
            head = parts[0].endswith(("_heads", "_last_layers"))
            parameter.requires_grad_(not head or parts[1] in used)
            if parameter.requires_grad:
                trained.append(parameter)
        return trained

    def _skip(self, names: list[str]) -> None:
        self.skipped.append(self.step)
        if self.log is not None:
            self.log.write("skipped", self.step, {"records": names})
        row = self.skipped[-MAX_SKIPPED_IN_A_ROW:]
        in_a_row = len(row) == MAX_SKIPPED_IN_A_ROW and row[-1] - row[0] == len(row) - 1
        recent = [step for step in self.skipped if step > self.step - 1000]
        if in_a_row or len(recent) >= MAX_SKIPPED:
            raise NotConvergedError(
                f"the gradient is not finite in steps {recent}; records of the last: {names}",
                code="TrainingDiverged",
                hint="lower the learning rate, or look at these records with coset data verify",
            )

    def must_validate(self, last: int) -> bool:
        """Every so many steps and at the end of a stage, if there is anything to validate on."""
        every = self.settings.run.valid_every
        now = self.step == last or (every and self.step % every == 0)
        return bool(self.prepared.valid) and bool(now)

    def validate(self, stage: StageSettings) -> dict[str, float]:
        """Errors of the averaged weights on every validation store."""
        raw = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averaged.values)
        metrics: dict[str, float] = {}
        for source in self.prepared.valid:
            found = validate(
                self.network,
                source,
                self.prepared.statistics.baseline,
                stage.loss,
                self.ranks,
                self.settings.run.valid_structures,
            )
            metrics |= {f"{source.store.path.name}.{name}": v for name, v in found.items()}
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, raw)
        self.metrics = metrics
        if self.log is not None:
            self.log.write("valid", self.step, {"stage": stage.name, **metrics})
            first = {n.rpartition(".")[2]: v for n, v in reversed(metrics.items())}
            if (value := score(first)) < self.best:
                self.best = value
                self._export("best")
        return metrics

    def must_save(self, last: int) -> bool:
        """At the end of a stage, and every few minutes."""
        minutes = (time.monotonic() - self.saved_at) / 60.0
        return self.step == last or minutes >= self.settings.run.checkpoint_minutes

    def save(self, ended: StageSettings | None) -> None:
        """Write the state; after a stage its averaged weights as a model as well."""
        if self.ranks.main:
            facts = Facts(
                step=self.step,
                run=self.prepared.run_digest,
                data=self.prepared.data_digest,
                best=self.best,
                skipped=tuple(self.skipped),
                metrics=self.metrics,
            )
            model, keep = self._model(), self.settings.run.keep
            save_state(self.directory, facts, self.network, self.optimizer, model, keep)
            if ended is not None:
                self._export(ended.name)
        self.saved_at = time.monotonic()

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _model(self) -> Checkpoint:
        values = [value.cpu() for value in self.averaged.values]
        training = {"steps": str(self.step), "data_sha256": self.prepared.data_digest}
        statistics = self.prepared.statistics
        return checkpoint_of(self.settings, statistics, self.network, values, training)

    def _export(self, name: str) -> None:
        save_checkpoint(self._model(), self.directory / "models" / name, overwrite=True)


def _precision(stage: StageSettings, device: torch.device) -> AbstractContextManager[object]:
    if stage.precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
