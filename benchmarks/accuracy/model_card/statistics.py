"""How errors are summed up."""

from collections.abc import Mapping

import numpy as np


def percent(value: float, expected: float) -> float:
    """Deviation in percent of what is expected."""
    return 100.0 * (value / expected - 1.0)


def spread(errors: Mapping[str, float]) -> dict:
    """Count, mean, mean and median absolute error, and the worst of named errors."""
    sound = {name: error for name, error in errors.items() if np.isfinite(error)}
    if not sound:
        return {"count": 0}
    values = np.array(list(sound.values()))
    worst = max(sound, key=lambda name: abs(sound[name]))
    return {
        "count": len(sound),
        "mean": float(values.mean()),
        "mae": float(np.abs(values).mean()),
        "median_absolute": float(np.median(np.abs(values))),
        "worst": sound[worst],
        "worst_name": worst,
    }
