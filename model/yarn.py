"""Context extension: the edit of a model's config that takes it to a longer context with YaRN."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

from model.config import DeepseekV3Config

# The report's alpha, beta and sqrt(1/t) = 0.1 ln s + 1 (section 4.3); the same in every phase.
YARN_CONSTANTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


def extend_context(config: DeepseekV3Config, factor: float, original_length: int = 0) -> DeepseekV3Config:
    """The config with YaRN on and a context of factor * original_length tokens (arXiv 2309.00071).

    `original_length`: the length the weights were trained at; 0: max_position_embeddings, or the one that YaRN has
    already. The weights stay; every length computes with other angles and, by mscale, another softmax scale.
    Raises ValueError for a factor that does not extend, and for YaRN over another original length.
    """
    if not math.isfinite(factor) or factor <= 1:
        raise ValueError(f"factor is {factor}: a context grows by a factor above 1, e.g. 4")
    scaling = config.rope_scaling or {}
    present = scaling.get("original_max_position_embeddings", 0)
    original = original_length or present or config.max_position_embeddings
    if present not in (0, original):
        raise ValueError(
            f"original length is {original}, but the model has YaRN over {present} already: give {present}, or start "
            "from the model as it was before its extension"
        )
    length = round(original * factor)
    if present and length <= config.max_position_embeddings:
        raise ValueError(
            f"factor is {factor}: {original} times that is {length}, no longer than the context it has, "
            f"{config.max_position_embeddings}; raise it"
        )
    yarn = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
    return dataclasses.replace(config, max_position_embeddings=length, rope_scaling=yarn | YARN_CONSTANTS)


def copy_with_config(source: str | Path, target: str | Path, config: DeepseekV3Config) -> None:
    """Writes `target`: the weights of the model directory `source` under another config.json, without a tokenizer.

    Keys of the source's config.json that are not ours (quantization_config) stay. Weights are hard links where the file
    system has them, so they take no space twice.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in [*Path(source).glob("*.safetensors"), *Path(source).glob("*.safetensors.index.json")]:
        try:
            os.link(path.resolve(), target / path.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(path, target / path.name)
    kept = json.loads((Path(source) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(kept | config.to_dict(), indent=2) + "\n")
