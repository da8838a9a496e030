"""The tiny model that learners are tested on."""

from pathlib import Path

import pytest
import torch
import yaml

from model.create import create_model

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    spec = yaml.safe_load(TINY.read_text())
    spec["config"]["initializer_range"] = 0.1  # attention and experts that do something
    directory = tmp_path_factory.mktemp("tiny")
    create_model(spec, directory, seed=0)
    return directory
