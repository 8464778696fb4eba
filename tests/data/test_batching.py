from dataclasses import replace

import numpy as np
import pytest

from coset.data.batching import Plan, Pool, equal_parts, visits_before
from coset.errors import ConfigError


def pool(size, share=1.0, seed=0):
    rng = np.random.default_rng(seed)
    length = np.where(np.arange(size) % 7 == 0, 2, 1)
    first = np.cumsum(length) - length
    return Pool(first=first, length=length, cost=rng.gamma(2.0, 50.0, size), share=share)


PLAN = Plan(pools=(pool(1000, 0.9), pool(37, 0.1, 1)), seed=1, slots=32, micro_batches=2, window=16)


def rows_of(plan, windows, store):
    steps = [step for w in windows for step in plan.window_of(w)]
    return np.concatenate([b.row[b.store == store] for step in steps for b in step])


def test_every_record_is_seen_once_per_epoch():
    single = replace(PLAN, pools=(pool(1000),))
    rows = rows_of(single, range(20), 0)
    counts = np.bincount(rows)
    assert len(counts) == 1000 + 143
    assert set(counts) <= {20 * 512 // 1000, 20 * 512 // 1000 + 1}


def test_shares_hold_in_every_window():
    for window in (0, 3, 1000):
        steps = PLAN.window_of(window)
        slots = np.concatenate([b.slot for step in steps for b in step])
        stores = np.concatenate([b.store for step in steps for b in step])
        first = np.unique(slots, return_index=True)[1]
        assert len(first) == 512
        assert abs((stores[first] == 1).sum() - 51.2) <= 1
        assert set(slots) == set(range(512 * window, 512 * (window + 1)))


def test_units_are_never_parted_and_keep_their_order():
    for step in PLAN.window_of(2):
        for batch in step:
            for slot in np.unique(batch.slot):
                rows = batch.row[batch.slot == slot]
                own = PLAN.pools[int(batch.store[batch.slot == slot][0])]
                unit = np.flatnonzero(own.first == rows[0])[0]
                assert list(rows) == list(own.first[unit] + np.arange(own.length[unit]))


def test_micro_batches_cost_the_same():
    costs = []
    for step in PLAN.window_of(5):
        assert len(step) == 2
        for batch in step:
            first = np.unique(batch.slot, return_index=True)[1]
            costs.append(
                sum(
                    PLAN.pools[s].cost[np.flatnonzero(PLAN.pools[s].first == r)[0]]
                    for s, r in zip(batch.store[first], batch.row[first], strict=True)
                )
            )
    assert np.std(costs) < 0.1 * np.mean(costs)


def test_the_plan_is_a_function_of_seed_and_window():
    again = replace(PLAN)
    other = replace(PLAN, seed=2)
    for one, two in zip(PLAN.window_of(4), again.window_of(4), strict=True):
        for a, b in zip(one, two, strict=True):
            assert (a.row == b.row).all()
            assert (a.slot == b.slot).all()
    assert rows_of(PLAN, [4], 0)[:50].tolist() != rows_of(other, [4], 0)[:50].tolist()


def test_a_giant_gets_a_part_of_its_own_and_no_part_is_empty():
    cost = np.array([1.0, 1, 1, 500, 1, 1, 1, 1])
    parts = equal_parts(cost, 4)
    assert [len(p) for p in parts] != [0]
    assert min(len(p) for p in parts) >= 1
    assert np.concatenate(parts).tolist() == list(range(8))
    assert [p.tolist() for p in equal_parts(np.ones(6), 3)] == [[0, 1], [2, 3], [4, 5]]


def test_visits_are_counted_without_a_history():
    shares = np.array([0.5, 0.3, 0.2])
    previous = visits_before(shares, 0)
    for window in range(1, 200):
        now = visits_before(shares, 64 * window)
        assert now.sum() == 64 * window
        assert (now >= previous).all()
        previous = now


def test_stores_without_usable_records_are_refused():
    empty = pool(0)
    with pytest.raises(ConfigError, match="usable"):
        replace(PLAN, pools=(empty,))


def test_shares_too_small_for_a_window_are_refused():
    plan = replace(PLAN, pools=(pool(10), pool(10, 7e-5), pool(10, 1.3e-4)))
    shares = np.array([p.share for p in plan.pools])
    visits = np.array([visits_before(shares, 512 * window) for window in range(2000)])
    bad = np.flatnonzero(np.diff(visits, axis=0).min(1) < 0)
    with pytest.raises(ConfigError, match="too short"):
        plan.window_of(int(bad[0]))
