"""Every peer at every setting, without our side: where a peer's best setting lies. Writes results/peers_alone.json.

python -m benchmarks.peers_alone
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import DECODE_CASES, DECODE_GRID, STEP_CASES, STEP_GRID, machine, run_peer, sweep, write_result
from benchmarks.make_model import make


def main() -> None:
    results: dict[str, list[dict[str, Any]]] = {}
    models = {kind: make(kind) for kind, _ in [*STEP_CASES.values(), *DECODE_CASES.values()]}
    before = machine()
    for peer, cases, grid in (("trl_step", STEP_CASES, STEP_GRID), ("hf_generate", DECODE_CASES, DECODE_GRID)):
        for case, (kind, settings) in cases.items():
            folder = models[kind]
            runs = sweep(run_peer, peer, folder / "model", folder / "prompts.json", settings, grid)
            results[f"{peer}/{case}"] = runs
            for run in runs:
                chosen = {name: run["settings"][name] for name in grid}
                print(
                    f"{peer} {case} {chosen}: {run['seconds']['median']:.4f} s, "
                    f"{run['tokens_per_second']['median']:.0f} tokens/s, mean length {run['mean_length']:.1f}"
                )
    print(write_result("peers_alone", "none: the peers' own figures, to find their best settings", before, results))


if __name__ == "__main__":
    main()
