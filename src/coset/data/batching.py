"""Which structures every optimizer step sees: a pure function of the seed and the step.

Slots are counted over the whole run; consecutive ones form a window. In every window each store
of the mixture has its share of the slots, which take the next units (structures, or pairs that
belong together) of that store's random permutation. The window is cut into micro-batches of equal
cost, in random order: every rank works out the same plan, nothing is carried over, and an
interrupted run needs no state but its step.
"""

from dataclasses import dataclass

import numpy as np

from coset.data.random import hashed, permuted
from coset.errors import ConfigError

ATOM_COST = 10.0
"""Work per atom over work per edge of a PET layer whose nodes are four times as wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """The units of one store: rows of their first records, and what each unit costs.

    first, length: of the records of each unit; cost: per unit; share: part of the slots.
    """

    first: np.ndarray
    length: np.ndarray
    cost: np.ndarray
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Records of one forward pass: store and row of each, and the slot its unit came from."""

    store: np.ndarray
    row: np.ndarray
    slot: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The order of a run: `slots` per step, `micro_batches` per step, `window` steps at a time."""

    pools: tuple[Pool, ...]
    seed: int
    slots: int
    micro_batches: int
    window: int

    def __post_init__(self) -> None:
        """Refuse stores in which nothing is left to learn from."""
        for number, pool in enumerate(self.pools):
            if not len(pool.first):
                raise ConfigError(f"training store {number} has no usable record")

    def window_of(self, number: int) -> list[list[MicroBatch]]:
        """All steps of a window, each a list of micro-batches."""
        size = self.slots * self.window
        slots = np.arange(number * size, (number + 1) * size)
        store, unit = self._units(number, slots)
        cost = np.empty(len(slots))
        for index, pool in enumerate(self.pools):
            cost[store == index] = pool.cost[unit[store == index]]
        n_batches = self.window * self.micro_batches
        parts = equal_parts(cost, n_batches)
        numbers = number * n_batches + np.arange(n_batches)
        order = np.argsort(hashed(self.seed, "micro-batches", numbers))
        batches = [
            self._micro_batch(store[p], unit[p], slots[p]) for p in map(parts.__getitem__, order)
        ]
        return [
            batches[k : k + self.micro_batches] for k in range(0, n_batches, self.micro_batches)
        ]

    def _units(self, number: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store and unit of every slot of a window; in every window the shares hold."""
        shares = np.array([pool.share for pool in self.pools])
        before = visits_before(shares, number * len(slots))
        counts = visits_before(shares, (number + 1) * len(slots)) - before
        if counts.min() < 0:
            raise ConfigError(
                f"a window of {len(slots)} structures is too short for shares {shares.tolist()}",
                field="data.train.share",
            )
        store = np.repeat(np.arange(len(shares)), counts)
        store = store[np.argsort(hashed(self.seed, "mixture", slots))]
        unit = np.empty(len(slots), np.int64)
        for index, pool in enumerate(self.pools):
            own = np.flatnonzero(store == index)
            epochs, positions = np.divmod(before[index] + np.arange(len(own)), len(pool.first))
            for epoch in np.unique(epochs):
                now = epochs == epoch
                order = f"order.{index}.{epoch}"
                unit[own[now]] = permuted(self.seed, order, len(pool.first), positions[now])
        return store, unit

    def _micro_batch(self, store: np.ndarray, unit: np.ndarray, slot: np.ndarray) -> MicroBatch:
        first, length = np.empty(len(unit), np.int64), np.empty(len(unit), np.int64)
        for index, pool in enumerate(self.pools):
            own = store == index
            first[own], length[own] = pool.first[unit[own]], pool.length[unit[own]]
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        return MicroBatch(
            store=np.repeat(store, length),
            row=np.repeat(first, length) + within,
            slot=np.repeat(slot, length),
        )


def equal_parts(cost: np.ndarray, n_parts: int) -> list[np.ndarray]:
    """Consecutive places cut into parts of about the same cost, none of them empty."""
    total = np.cumsum(cost)
    parts, start, done = [], 0, 0.0
    for part in range(n_parts):
        left = n_parts - part
        aim = done + (total[-1] - done) / left
        end = int(np.searchsorted(total, aim))
        if end < len(cost) and total[end] - aim <= aim - (total[end - 1] if end else 0.0):
            end += 1
        end = len(cost) if left == 1 else min(max(end, start + 1), len(cost) - left + 1)
        parts.append(np.arange(start, end))
        start, done = end, float(total[end - 1])
    return parts


def visits_before(shares: np.ndarray, slot: int) -> np.ndarray:
    """How many of the slots before this one (the start of a window) belong to each store."""
    ends = np.floor(slot * np.cumsum(shares / shares.sum()) + 1e-6).astype(np.int64)
    ends[-1] = slot
    return np.diff(ends, prepend=0)
