"""Checkpoints of a run: `checkpoints/step_N/`, a HF model directory with `train_state/` beside the weights.

A checkpoint is written under another name and renamed when everything is on disk, so a directory named step_N is
whole, whatever was killed when.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from grpo.cluster import Cluster
from grpo.partial import Rollouts


def save_checkpoint(
    run_dir: Path, step: int, cluster: Cluster, state: dict[str, Any], tokenizer: Any, rollouts: Rollouts | None = None
) -> Path:
    """Writes the checkpoint of a step: weights, optimiser, tokenizer, unfinished samples, loop `state` (JSON)."""
    final = run_dir / "checkpoints" / f"step_{step}"
    partial = final.with_name(f".partial_step_{step}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    cluster.save(str(partial.resolve()))
    tokenizer.save_pretrained(partial)
    (partial / "train_state" / "loop.json").write_text(json.dumps({"step": step, **state}))
    if rollouts is not None and rollouts.left:
        rollouts.save(partial / "train_state" / "unfinished.npz")
    _flush(partial)
    shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from an earlier step
    os.replace(partial, final)
    _sync(final.parent)
    return final


def last_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """(directory, state of the loop) of the newest whole checkpoint; None if there is none."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / "train_state" / "loop.json").is_file():
            found.append((int(match[1]), path))
    if not found:
        return None
    path = max(found)[1]
    return path, json.loads((path / "train_state" / "loop.json").read_text())


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
