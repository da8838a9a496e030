"""Peer: versions of the packages of .venv-rewards."""

import json

from benchmarks.common import versions

if __name__ == "__main__":
    print(json.dumps(versions("trl", "verl", "openrlhf", "verifiers", "math-verify", "sympy", "torch", "transformers")))
