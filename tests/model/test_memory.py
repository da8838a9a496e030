"""Loading and converting take memory for what they make and little else: the benchmark's measurement, on 100 MiB."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.load_memory import make_checkpoints, measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    folder, tiny = tmp_path_factory.mktemp("memory"), tmp_path_factory.mktemp("tiny")
    make_checkpoints(folder, hidden_size=1024, experts=2)
    make_checkpoints(tiny, hidden_size=64, experts=2)
    return folder, tiny


def test_loading_peaks_at_one_copy(folders: tuple[Path, Path]) -> None:
    found = measure("load bf16", *folders)
    assert found["weights_bytes"] > 64 << 20
    assert found["peak_over_weights"] <= found["allowed"] < 1.3, found


def test_converting_keeps_no_copy(folders: tuple[Path, Path]) -> None:
    found = measure("convert fp8", *folders)
    assert found["weights_bytes"] > 64 << 20
    assert found["peak_over_weights"] <= 0.7, found  # a few matrices in FP32; the largest has an eighth of all weights
