"""Counter-based randomness: every draw is a pure function of (seed, position).

Nothing here has state, so a draw does not depend on the engine, on the other requests of a batch or on their order.
The mixer is SplitMix64's finaliser (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values with a stable repr, such as (run.seed, prompt id, visit)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def sample_seeds(seed: int, n: int) -> np.ndarray:
    """[n] uint64: the seed of each sample of a request."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(seed & (2**64 - 1)) + GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[B] float64 in (0, 1) for seeds [B] uint64 and positions [B]: one number for each position of each sample."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds + GOLDEN) ^ _mix(positions.astype(np.uint64) * GOLDEN + GOLDEN))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
