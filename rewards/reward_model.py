"""A trained model as a reward: it reads prompt and completion and gives one number, no chain of thought.

A score depends on its own text alone, not on what else is in the batch (allenai/reward-bench #137).
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, as_score, failure
from rewards.scorers import Forward, Text, find_scorer

STATISTICS = "reward_model.json"  # beside the weights: mean and std of the scores on held-out completions
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
WHOLE_BYTES = 64 << 20  # files up to this size count to the last byte in a fingerprint
_START_BYTES = 1024


def reward_model(
    *,
    model: str,
    batch_size: int = 16,
    max_length: int = 0,
    too_long: str = "error",
    scale: float = 1.0,
    shift: float = 0.0,
    standardize: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Rule:
    """scale * score + shift, with the score of the model in the directory `model`.

    Our own models read the prompt (through the chat template, if it is messages), the completion and the eos token, as
    the policy's tokens have it. Models of transformers read messages, the completion as the assistant's, through the
    tokenizer's template; of a string prompt, prompt and completion as one text with the tokenizer's special tokens,
    ended by its eos token. Nothing is cut: a text of more than `max_length` tokens (0: the model's context) is
    an ERROR, or NOT_APPLICABLE with too_long="not_applicable".

    `standardize`: the score less its mean, over its standard deviation, both as training left them in
    reward_model.json. `batch_size`: texts in a forward pass. `device`: auto is CUDA where there is any. `dtype`:
    float32, bfloat16, or auto, the one the weights have. Scores of a text in different batches agree to 1e-5 in
    float32. The weights are read with the first batch. ValueError: no such directory, a model without a scalar head,
    a bad option.
    """
    if not isinstance(model, str) or not model:
        raise ValueError(f"rewards.reward_model.model is {model!r}; give the path of a model directory")
    directory = Path(model)
    _check(batch_size, max_length, too_long, scale, shift, device, dtype)
    built = find_scorer(directory, device, dtype)
    if built.context and max_length > built.context:
        raise ValueError(
            f"rewards.reward_model.max_length is {max_length}, but the model's context is {built.context}; lower it"
        )
    limit = max_length or built.context
    mean, std = _statistics(directory) if standardize else (0.0, 1.0)
    network = _Network(built.load)
    over = Status.ERROR if too_long == "error" else Status.NOT_APPLICABLE

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        texts: dict[int, Text] = {}
        for place, sample in enumerate(inputs):
            try:
                text = built.encode(sample)
            except Exception as error:  # the reward boundary: a text the tokenizer cannot read costs itself alone
                scores[place] = failure(Status.ERROR, f"{type(error).__name__}: {error}")
                continue
            length = len(text[0]) + len(text[1])
            if limit and length > limit:
                scores[place] = failure(over, f"{length} tokens with the prompt; the reward model reads {limit}")
            elif not length:
                scores[place] = failure(Status.ERROR, "neither prompt nor completion has a token")
            else:
                texts[place] = text
        # equal prompts side by side, then by length: the first are computed once, the last need little padding
        places = sorted(texts, key=lambda place: (texts[place][0], len(texts[place][1])))
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            for place, raw in zip(batch, _forward(network, [texts[place] for place in batch])):
                scores[place] = raw
                if raw.value is not None:
                    scores[place] = replace(raw, value=scale * (raw.value - mean) / std + shift)
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    return Rule(score, runs="model", version=fingerprint(directory), close=network.close)


class _Network:
    """The model, read when it is first needed; safe from any thread."""

    def __init__(self, load: Callable[[], Forward]) -> None:
        self._load, self._lock = load, threading.Lock()
        self._forward: Forward | None = None

    def get(self) -> Forward:
        with self._lock:
            self._forward = self._forward or self._load()
            return self._forward

    def close(self) -> None:
        with self._lock:
            self._forward = None


def _forward(network: _Network, texts: Sequence[Text]) -> list[Score]:
    """The model's own scores of a batch."""
    forward = network.get()  # what is wrong with the model is wrong with every sample: it stops the run
    start = time.perf_counter()
    try:
        verdicts = [as_score(value) for value in forward(texts)]
    except Exception as error:  # the reward boundary: out of memory, as a rule
        verdicts = [failure(Status.ERROR, f"{type(error).__name__}: {error}")] * len(texts)
    return [replace(verdict, run_s=(time.perf_counter() - start) / len(texts)) for verdict in verdicts]


def fingerprint(directory: Path) -> str:
    """Changes when the model or its tokenizer does. Of a large file, every tensor's first KiB is read."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in _MODEL_FILES):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as stream:
            if size <= WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for start in _starts(stream, path.suffix, size):
                stream.seek(start)
                digest.update(stream.read(_START_BYTES))
    return digest.hexdigest()[:16]


def _starts(stream: BinaryIO, suffix: str, size: int) -> list[int]:
    """Where the tensors of a safetensors file begin; 256 places of any other."""
    if suffix != ".safetensors":
        return [size * i // 256 for i in range(256)]
    length = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return [0, *sorted(8 + length + entry["data_offsets"][0] for entry in header.values())]


def _statistics(directory: Path) -> tuple[float, float]:
    path = directory / STATISTICS
    try:
        scores: Mapping[str, float] = json.loads(path.read_text())["scores"]
        mean, std = float(scores["mean"]), float(scores["std"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(
            f"rewards.reward_model.standardize is true, but {path} has no mean and std of the model's scores; "
            "set scale and shift yourself"
        ) from None
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"rewards.reward_model.standardize is true, but {path} has mean {mean} and std {std}")
    return mean, std


def _check(batch_size: Any, max_length: Any, too_long: Any, scale: Any, shift: Any, device: Any, dtype: Any) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"rewards.reward_model.{name} is {value!r}; give a whole number of at least {least}")
    for name, value in (("scale", scale), ("shift", shift)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"rewards.reward_model.{name} is {value!r}; give a finite number")
    for name, value, known in (
        ("too_long", too_long, ("error", "not_applicable")),
        ("dtype", dtype, ("auto", "float32", "bfloat16")),
    ):
        if value not in known:
            raise ValueError(f"rewards.reward_model.{name} is {value!r}; give one of {', '.join(known)}")
    if device != "auto":
        import torch

        try:
            known_device = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"rewards.reward_model.device is {device!r}; give auto, cpu or cuda") from None
        if known_device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"rewards.reward_model.device is {device!r}, but there is no CUDA here; give auto or cpu")
