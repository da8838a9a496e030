"""The benchmark of a whole learner step, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, fp8_step


def test_rows_are_full_and_flops_are_those_of_the_products() -> None:
    config = fp8_step.configuration(2, tiny=True)
    batches = fp8_step.rows_of(config, 2, 64, seed=0)
    assert [b.input_ids.numel() for b in batches] == [64, 64]
    tokens, targets = 128, sum(len(b.target) for b in batches)
    attention = 64 * 128 + 64 * 48 + 32 * 128 + 64 * 64  # q, kv_a, kv_b, o
    dense, experts, router = 3 * 64 * 96, 3 * 64 * 32 * (2 + 2), 64 * 8  # two of eight, two shared
    body = 2 * tokens * (2 * attention + dense + experts + router)
    head, pairs = 2 * targets * 64 * 96, sum(int((b.position_ids + 1).sum()) for b in batches)
    scores = 2 * 2 * pairs * 4 * (32 + 16)  # two layers, four heads
    assert fp8_step.model_flops(config, batches) == pytest.approx(3 * (body + head + scores), rel=0.01)


def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides train on the same rows, each part has its time, and a tiny run is no result."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["fp8_step", "--tiny", "--rows", "1", "--steps", "1", "--warmup", "1"])
    threads = torch.get_num_threads()
    fp8_step.main()
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for side in ("bf16", "fp8"):
        assert f"{side}: step 1" in shown
    for part in ("routed experts", "head and loss", "attention core", "optimiser", "router"):
        assert shown.count(f"  {part} ") == 2, part
    assert "FP8 is " in shown and not list(tmp_path.iterdir())
