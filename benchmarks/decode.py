"""Tokens a second of the embedded engine against transformers' `generate` at its best. Writes results/decode.json.

python -m benchmarks.decode [CASE ...]
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.common import (
    DECODE_CASES,
    DECODE_GRID,
    alternate,
    machine,
    middle,
    points,
    run_ours,
    run_peer,
    sweep,
    write_result,
)
from benchmarks.make_model import make

CLAIM = (
    "The embedded engine samples at least 1.2 times (equal lengths) and 2 times (uneven) the tokens of transformers."
)


def compare(case: str) -> dict[str, Any]:
    kind, settings = DECODE_CASES[case]
    folder = make(kind)
    files = folder / "model", folder / "prompts.json"
    swept = sweep(run_peer, "hf_generate", *files, settings, DECODE_GRID)
    best = settings | {key: swept[0]["settings"][key] for key in DECODE_GRID}
    rounds = alternate(
        {
            "ours, 1 thread": lambda: run_ours("decode", *files, settings | {"threads": 1}),
            "ours, 2 threads": lambda: run_ours("decode", *files, settings | {"threads": 2}),
            "transformers": lambda: run_peer("hf_generate", *files, best),
        }
    )
    summary = {side: middle(runs) for side, runs in rounds.items()}
    peer = summary["transformers"]["tokens_per_second"]
    ratios = {side: figures["tokens_per_second"] / peer for side, figures in summary.items()}
    print(f"decode {case}: transformers at its best with { ({key: best[key] for key in DECODE_GRID}) }")
    for side, figures in summary.items():
        print(f"  {side}: {figures['tokens_per_second']:.0f} tokens/s, mean length {figures['mean_length']:.1f}, "
              f"{ratios[side]:.2f} times transformers")  # fmt: skip
    return {"summary": summary, "ratios": ratios, "peer_sweep": points(swept, DECODE_GRID), "rounds": rounds}


def main() -> None:
    before = machine()
    results = {case: compare(case) for case in sys.argv[1:] or DECODE_CASES}
    print(write_result("decode", CLAIM, before, results))


if __name__ == "__main__":
    main()
