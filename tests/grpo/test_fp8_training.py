"""The FP8 training benchmark on a GPU: what it computes, on a CPU, and on a Hopper GPU the kernels in its place."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fp8_training_gpu as benchmark
from benchmarks.fp8_training import build, mean_loss, updates
from grpo.config import StageConfig
from grpo.learner import Learner
from model.fp8.modules import Mode

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def test_batches_are_the_text_in_another_order() -> None:
    text = (np.arange(50) + 7).astype(np.uint8)
    taken = list(islice(benchmark.batches(text, 0, 4, 6), 4))  # 8 blocks: two epochs
    assert all(batch.shape == (4, 7) for batch in taken)
    for epoch in (taken[:2], taken[2:]):
        starts = np.sort(np.concatenate(epoch)[:, 0])
        assert starts.tolist() == [7, 13, 19, 25, 31, 37, 43, 49]
    assert (np.diff(np.concatenate(taken), axis=1) == 1).all()
    again = list(islice(benchmark.batches(text, 0, 4, 6), 4))
    assert all((a == b).all() for a, b in zip(taken, again))
    assert any((a != b).any() for a, b in zip(taken, benchmark.batches(text, 1, 4, 6)))
    source = benchmark.text()
    assert len(source) > 5_000_000 and b"import" in source[:20_000].tobytes()


def test_differences_are_those_of_smoothed_losses() -> None:
    assert benchmark.smoothed([2.0, 1.0, 1.0]) == pytest.approx([2.0, 1.9, 1.81])
    assert benchmark.difference([2.0, 1.0], [2.0, 2.0, 5.0]) == pytest.approx([0.0, -5.0])
    curves = {"bf16": [4.0, 2.0, 2.0], "bf16_rounding": [4.0, 2.0, 2.0], "fp8": [4.0, 2.2, 2.1]}
    runs = {(arm, 7): {"losses": losses} for arm, losses in curves.items()} | {("fp8_emulated", 7): {"losses": [4.04]}}
    found = benchmark.summary(runs, [7])
    assert found["bf16_rounding"]["difference_percent"] == 0
    assert found["fp8"] == {"difference_percent": 0.773, "by_seed": [0.773], "largest_of_second_half": [0.773]}
    assert found["fp8_from_emulated"] == {"largest_percent_of_first_steps": [0.9901]}


def test_the_page_of_curves(tmp_path: Path) -> None:
    benchmark.plot({"bf16, seed 4": [2.0, 1.0], "fp8, seed 4": [2.0, 1.5]}, tmp_path / "runs" / "page.html")
    page = (tmp_path / "runs" / "page.html").read_text()
    assert page.count('"name":"fp8, seed 4"') == 2 and page.count('"name":"bf16, seed 4"') == 1


def test_the_tiny_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """Each arm goes on from what was saved before them; without --continued it starts anew, and is else the same."""
    benchmark.main(["--tiny", "--continued", "--seeds", "3"])
    results = json.loads(capsys.readouterr().out)
    assert results["mode"] == "emulate" and results["tokens_a_step"] == 256
    assert results["fp8_from_emulated"] == {"largest_percent_of_first_steps": [0.0]}  # one and the same here
    assert 0 < abs(results["fp8"]["difference_percent"]) < 0.5
    assert abs(results["bf16_rounding"]["difference_percent"]) < 0.1
    assert results["loss_at_the_end"]["bf16"][0] < np.log(256) - 0.2
    assert 1 < results["most_loaded_expert_over_mean"]["fp8"][0] <= 4  # 8 experts, a token goes to 2


def test_masters_are_not_on_the_grid_of_bf16() -> None:
    plain, fp8 = (benchmark.new_learner(benchmark.TINY, 3, mode) for mode in ("off", "emulate"))
    for parameter, master, other in zip(plain.policy.parameters, plain.policy.master, fp8.policy.master):
        assert (parameter == master.bfloat16()).all() and (master == other).all()
    assert (plain.policy.master[0] != plain.policy.parameters[0]).float().mean() > 0.9


def trained(fp8: Mode) -> tuple[np.ndarray, torch.Tensor]:
    """The losses of five updates, and the gradient of the first, in one row."""
    setup = replace(benchmark.TINY, batch=16, length=128)
    model = build(setup.model, 0, fp8, device="cuda")
    learner = Learner("", StageConfig(max_steps=5, learning_rate=1e-3), model=model, device="cuda")
    gradients, clip = [], learner.policy.clip

    def noted(max_norm: float) -> list[torch.Tensor]:
        gradients.append(torch.cat([m.grad.flatten() for m in learner.policy.master if m.grad is not None]))
        return clip(max_norm)

    learner.policy.clip = noted  # type: ignore[method-assign]
    data = islice(benchmark.batches(benchmark.text(), 0, setup.batch, setup.length), 5)
    return np.array([mean_loss(stats) for _, stats in updates(learner, data)]), gradients[0]


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_kernels_train_as_their_emulation() -> None:
    """Tensor cores keep 14 bits of a sum, and what lies near the edge of a code then crosses it: one percent of a
    gradient, where FP8 itself makes seven."""
    (got, g_got), (want, g_want), (plain, g_plain) = (trained(fp8) for fp8 in ("on", "emulate", "off"))
    found = {
        "losses": float(np.abs(got / want - 1).max()),
        "losses without FP8": float(np.abs(plain / want - 1).max()),
        "gradients": float((g_got - g_want).norm() / g_want.norm()),
        "gradients without FP8": float((g_plain - g_want).norm() / g_want.norm()),
    }
    print(found)
    assert found["losses"] < 1e-3 and found["gradients"] < 0.03, found
    assert found["gradients without FP8"] > 0.05, found
