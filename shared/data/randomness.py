"""Counter-based randomness: every draw is a function of (seed, what it is for, index), never of earlier draws.

So a resumed run needs no generator state, the number of data workers changes nothing, and any sample of any epoch
is found in constant time and memory.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # step of splitmix64's counter, Steele et al. 2014
_ROUNDS = 6  # of the Feistel network; 4 already give a pseudo-random permutation (Luby and Rackoff 1988)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64 as well


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, for `torch.manual_seed` and `numpy.random.Philox`."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)  # 3 and numpy's 3 are the same
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform_numbers(seed: int, *counters: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for many samples at once, by splitmix64; a row depends on its counters alone.

    Args:
        seed: another seed gives other numbers.
        counters: int64 (N,) each, not negative, such as the epoch and the index of each sample.
        count: numbers of a sample.

    Returns:
        float64 (N, count).
    """
    keys = np.full(len(counters[0]), seed, dtype=np.uint64)
    for counter in counters:
        keys = _splitmix(keys + (counter.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    bits = _splitmix(keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53  # as many bits as a float64 has


def normal_numbers(seed: int, *counters: np.ndarray, count: int) -> np.ndarray:
    """Standard normal numbers (Box and Muller 1958), otherwise like `uniform_numbers`."""
    pairs = -(-count // 2)
    uniform = uniform_numbers(seed, *counters, count=2 * pairs)
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, :pairs])), 2 * np.pi * uniform[:, pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :count]


def shuffled_indices(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where the given positions of a shuffled order of `range(size)` point to, without building that order.

    A Feistel network over the next even power of two, walked until it lands below `size` (Black and Rogaway 2002,
    cycle walking): a permutation in O(1) memory, so an epoch of any length is resumed anywhere at no cost.

    Args:
        positions: int64, any shape, each in [0, size).
        size: length of the order.
        seed: another seed gives another order.

    Returns:
        int64 of the same shape, each in [0, size).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.Philox(key=seed).random_raw(_ROUNDS)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, mask, keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_splitmix(right + key) & mask)
    return (left << half_bits) | right


def _splitmix(values: np.ndarray) -> np.ndarray:
    """Spread every bit of uint64 over all others."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
