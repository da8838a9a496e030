"""Claim: the smoke recipe learns with LoRA. Seeds 0, 1, 2 gain 20 points or more of held-out greedy accuracy, with a
log-probability difference between engine and learner below 1e-4.

    python -m benchmarks.lora_smoke [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.common import machine, write_result
from benchmarks.smoke_learns import train


def numbers(path: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(path).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [train(int(seed), Path(folder), False, "configs/smoke_lora.yaml") for seed in args.seeds.split(",")]
        last = next(Path(folder).glob("seed-*/checkpoints/step_500"))
        sizes = {
            "model_parameters": numbers(last / "model.safetensors"),
            "adapter_parameters": numbers(last / "adapter" / "adapter_model.safetensors"),
        }
    print(write_result("lora_smoke", __doc__ or "", before, {"runs": rows, **sizes}))


if __name__ == "__main__":
    main()
