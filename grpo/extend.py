"""Context extension (`grpo pretrain` with an `extend` section): YaRN, then phases of training at growing lengths.

    short model --config edit--> YaRN on --phase 1--> 2L --phase 2--> 4L        needle checks before and after

The recipe of DeepSeek-V3 (report, section 4.3): YaRN with its final factor from the first step on, the same constants
in every phase, longer blocks, a low learning rate. Checks are greedy answers of the embedded engine, exactly matched.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo.config import Config, ConfigError, ExtendConfig, StageConfig
from grpo.data import load_rows
from grpo.needle import make_needle
from grpo.prepare import cached, load_tokenizer
from grpo.stages import run_pretrain
from model.config import DeepseekV3Config
from model.create import encode
from model.yarn import copy_with_config, extend_context
from rollout import SamplingParams, build_engine

BINS = 10  # deciles of depth
CHECK_SEED = "needle check"  # no training row is drawn from it
CHECK_BATCH = 64  # prompts of a check answered at a time
LABELS = {
    "before": "before, without YaRN",
    "yarn": "YaRN on, before training",
    "after": "after the phases",
}
COLORS = ("#888888", "#d98200", "#1f6fd0")


def run_extend(config: Config, model_dir: Path, out: Path) -> dict[str, Any]:
    """Extends the model and writes it to `out`, with needle.json (returned) and needle.html.

    A model made from model.init is first trained by the `pretrain` section; that one is kept under runs/.cache.
    Raises ValueError, before anything is trained, for lengths that do not fit together.
    """
    extend = config.extend
    assert extend is not None, "no extend section"
    torch.set_num_threads(config.run.threads)
    began = time.monotonic()
    short = DeepseekV3Config.from_pretrained(model_dir)
    long = extend_context(short, extend.factor, extend.original_length)
    lengths = [round(long.max_position_embeddings / extend.factor), long.max_position_embeddings]
    tokenizer = load_tokenizer(model_dir)
    _check_lengths(config, extend, tokenizer, lengths)
    start = _short_model(config, model_dir)
    trained = time.monotonic()
    checks: dict[str, Any] = {}

    def check(name: str, directory: Path) -> None:
        checks[name] = {str(length): needle_check(config, directory, length) for length in lengths}
        shown = ", ".join(f"{100 * checks[name][str(n)]['accuracy']:.1f} % at {n}" for n in lengths)
        print(f"needle accuracy, {LABELS[name]}: {shown}", flush=True)

    def start_with(model_config: DeepseekV3Config, name: str) -> Path:
        copy_with_config(start, out / name, model_config)
        tokenizer.save_pretrained(out / name)
        return out / name

    # first the short model as it is, asked for more than it was trained for
    plain = start_with(dataclasses.replace(short, max_position_embeddings=long.max_position_embeddings), "plain")
    check("before", plain)
    shutil.rmtree(plain)
    current = start_with(long, "phase_0")
    check("yarn", current)
    for number, phase in enumerate(extend.phases, start=1):
        print(f"phase {number}: {phase.max_steps} steps at {phase.block_size} tokens", flush=True)
        following = out if number == len(extend.phases) else out / f"phase_{number}"
        run_pretrain(_at_length(config, phase), current, following)
        current = following
    check("after", current)
    result = {
        "lengths": lengths,
        "prompts": extend.check_size,
        "checks": checks,
        "seconds": {"short": round(trained - began, 1), "extension": round(time.monotonic() - trained, 1)},
    }
    (out / "needle.json").write_text(json.dumps(result, indent=1) + "\n")
    write_plot(result, out / "needle.html")
    before, after = (100 * checks[name][str(lengths[1])]["accuracy"] for name in ("before", "after"))
    print(f"needle accuracy at {lengths[1]} tokens: {before:.1f} % before, {after:.1f} % after", flush=True)
    return result


def needle_check(config: Config, model_dir: Path, length: int) -> dict[str, Any]:
    """Greedy answers to extend.check_size needle prompts of `length` tokens, their needles spread over all depths.

    -> accuracy (exact match), and by_depth: the same for each tenth of the context, from its start.
    """
    assert config.extend is not None, "no extend section"
    size, tokenizer = config.extend.check_size, load_tokenizer(model_dir)
    fitting = _text_length(tokenizer, length)
    needles = [
        make_needle(random.Random(f"{CHECK_SEED}/{length}/{i}"), fitting, depth=(i + 0.5) / size) for i in range(size)
    ]
    prompts = [encode(tokenizer, needle.prompt) for needle in needles]
    params = [SamplingParams(temperature=0.0, max_tokens=len(encode(tokenizer, n.answer))) for n in needles]
    engine = build_engine(model_dir, max_num_seqs=CHECK_BATCH)
    completions = engine.generate(prompts, params)
    texts = tokenizer.batch_decode([c[0].token_ids for c in completions], skip_special_tokens=True)
    right = np.array([text == needle.answer for text, needle in zip(texts, needles)], dtype=np.float64)
    tenth = np.array([min(int(needle.depth * BINS), BINS - 1) for needle in needles])
    by_depth = [float(right[tenth == b].mean()) if (tenth == b).any() else None for b in range(BINS)]
    return {"accuracy": float(right.mean()), "by_depth": by_depth}


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy over depth, a panel for each length and a line for each check, as one HTML file with its script."""
    from plotly.graph_objects import Figure, Scatter
    from plotly.subplots import make_subplots

    lengths = result["lengths"]
    figure: Figure = make_subplots(
        cols=len(lengths), shared_yaxes=True, subplot_titles=[f"{n} tokens" for n in lengths]
    )
    for (name, label), color in zip(LABELS.items(), COLORS):
        for column, length in enumerate(lengths, start=1):
            check = result["checks"][name][str(length)]
            figure.add_trace(
                Scatter(
                    x=[(b + 0.5) / BINS for b in range(BINS)],
                    y=check["by_depth"],
                    name=label,
                    legendgroup=name,
                    showlegend=column == 1,
                    line={"color": color},
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(title="depth of the needle, share of the context", range=[0, 1])
    figure.update_yaxes(title="share of exact answers", range=[-0.03, 1.03], col=1)
    figure.update_layout(title="Needle retrieval by length and depth")
    figure.write_html(path, include_plotlyjs=True)


def _check_lengths(config: Config, extend: ExtendConfig, tokenizer: Any, lengths: Sequence[int]) -> None:
    """What would stop a run half-way is found at once."""
    for number, phase in enumerate(extend.phases):
        if phase.block_size > lengths[-1]:
            raise ConfigError(
                f"extend.phases.{number}.block_size {phase.block_size} is more than the extended context of "
                f"{lengths[-1]} (extend.factor times the original length); lower it"
            )
    for phase in extend.phases if config.data.task else extend.phases[:1]:
        load_rows(_at_length(config, phase, size=1).data)
    for length in lengths:
        try:
            _text_length(tokenizer, length)
        except ValueError as err:
            raise ConfigError(f"the needle check cannot be made at {length} tokens: {err}") from err


def _short_model(config: Config, model_dir: Path) -> Path:
    if config.model.path or config.pretrain is None:
        return model_dir
    key = {
        "model": model_dir.name,  # of the cache: a hash of everything that went into it
        "pretrain": config.pretrain.model_dump(),
        "data": config.data.model_dump(),
        "run": [config.run.seed, config.run.threads, *config.model.precision],
    }
    stage = config.pretrain

    def build(out: Path) -> None:
        print(f"short model: {stage.max_steps} steps at {stage.block_size} tokens", flush=True)
        run_pretrain(_at_length(config, stage), model_dir, out)

    return cached(config, "pretrain", key, build)


def _at_length(config: Config, stage: StageConfig, size: int = 0) -> Config:
    """The configuration with `stage` as its pretrain section; needle texts fill its blocks and are seen once each."""
    data = config.data
    if data.task == "needle":
        options = {**data.task_options, "length": stage.block_size - 1}  # the end token is the last of a block
        data = data.model_copy(update={"task_options": options, "size": size or stage.max_steps * stage.batch_size})
    return config.model_copy(update={"pretrain": stage, "data": data})


def _text_length(tokenizer: Any, length: int) -> int:
    """The length that makes needle texts of about `length` tokens, and not more; itself where needles are tokens."""
    needle = make_needle(random.Random(0), length)
    tokens = len(encode(tokenizer, needle.prompt + needle.answer))
    if tokens == length:
        return length
    fitting = int(0.95 * length * length / tokens)  # texts differ a little
    make_needle(random.Random(0), fitting)
    return fitting
