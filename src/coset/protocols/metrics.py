"""From records to the numbers of a table."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from coset.protocols.records import Metric, Row

Statistic = Callable[[Float[ndarray, " rows"]], float]

GROUPS = ("all", "seen", "unseen")


def group_of(rows: Sequence[Row], group: str) -> list[Row]:
    """The rows of a group."""
    return [row for row in rows if group == "all" or row.unseen == (group == "unseen")]


def error_metrics(rows: Sequence[Row], name: str, *, unit: str) -> list[Metric]:
    """Mean and median absolute error, mean error and mean relative error of a value, by group.

    unit: the end of the name of the value, which the names of the errors end with.
    """
    stem = name.removesuffix(f"_{unit}")
    metrics = []
    for group in GROUPS:
        pairs = _pairs(group_of(rows, group), name)
        if not len(pairs):
            continue
        error = pairs[:, 0] - pairs[:, 1]
        relative = np.abs(error) / np.abs(pairs[:, 1])
        for label, value in (
            (f"{stem}_mae_{unit}", float(np.abs(error).mean())),
            (f"{stem}_median_{unit}", float(np.median(np.abs(error)))),
            (f"{stem}_bias_{unit}", float(error.mean())),
            (f"{stem}_relative_percent", 100.0 * float(relative.mean())),
        ):
            metrics.append(Metric(name=label, group=group, value=value, count=len(pairs)))
    return metrics


def mean_metrics(
    rows: Sequence[Row], name: str, statistic: Statistic = np.mean, *, called: str = ""
) -> list[Metric]:
    """The mean, or another statistic, of a value that has no reference, by group."""
    metrics = []
    for group in GROUPS:
        values = [v.own for row in group_of(rows, group) if (v := row.value(name)) is not None]
        if values:
            metrics.append(
                Metric(
                    name=called or name,
                    group=group,
                    value=float(statistic(np.array(values))),
                    count=len(values),
                )
            )
    return metrics


def finished(rows: Sequence[Row]) -> list[Row]:
    """The rows without fault."""
    return [row for row in rows if row.status == "ok"]


def _pairs(rows: Sequence[Row], name: str) -> Float[ndarray, "rows 2"]:
    found = [
        (value.own, value.reference)
        for row in rows
        if (value := row.value(name)) is not None and value.reference is not None
    ]
    return np.array(found, dtype=float).reshape(-1, 2)
