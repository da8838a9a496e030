"""The reward of benchmarks/peers/trl_step.py as a user's function: a fixed coin flip for each text."""

import zlib


def coin(completion: str, prompt: str) -> float:
    """Says nothing about quality; gives groups the variance that a gradient needs."""
    return float(zlib.crc32(completion.encode()) % 2)
