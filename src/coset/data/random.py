"""Random numbers that are a pure function of what they are for.

Everything random in training is a hash of (seed, purpose, number), so that it depends neither on
order nor on the number of processes, and an interrupted run needs no generator state.
The hash is SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, OOPSLA 2014).
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: a bijection of 64-bit integers that scatters them."""
    z = values.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed(seed: int, purpose: str, numbers: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every number, for one seed and purpose."""
    key = np.array([seed], np.uint64)
    for letter in purpose.encode():
        key = mix(key * GOLDEN + np.uint64(letter))
    return mix(mix(numbers.astype(np.uint64) + key) * GOLDEN + key)


def uniform(seed: int, purpose: str, numbers: np.ndarray, count: int) -> np.ndarray:
    """[numbers, count] values in [0, 1), 53 bits each."""
    columns = [hashed(seed, f"{purpose}.{k}", numbers) for k in range(count)]
    bits = np.stack(columns, axis=1) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def permuted(seed: int, purpose: str, size: int, positions: np.ndarray) -> np.ndarray:
    """Places of `positions` under a random permutation of range(size), without storing it.

    A Feistel network of six rounds over the next power of four, walked until it falls inside.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = np.uint64((1 << half) - 1)
    values = positions.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        left, right = values[pending] >> np.uint64(half), values[pending] & mask
        for turn in range(6):
            left, right = right, left ^ (hashed(seed, f"{purpose}.{turn}", right) & mask)
        values[pending] = (left << np.uint64(half)) | right
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


def orthogonal(seed: int, purpose: str, numbers: np.ndarray) -> np.ndarray:
    """One matrix of O(3) per number, Haar distributed, improper with probability 1/2; [n, 3, 3].

    Rotation from a uniform unit quaternion (K. Shoemake, Graphics Gems III, 1992).
    """
    u = uniform(seed, purpose, numbers, 4)
    a, b = np.sqrt(1.0 - u[:, 0]), np.sqrt(u[:, 0])
    s, t = 2.0 * np.pi * u[:, 1], 2.0 * np.pi * u[:, 2]
    x, y, z, w = a * np.sin(s), a * np.cos(s), b * np.sin(t), b * np.cos(t)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    rotations = np.moveaxis(np.array(rows), 2, 0)
    return rotations * np.where(u[:, 3] < 0.5, -1.0, 1.0)[:, None, None]
