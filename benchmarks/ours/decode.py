"""Our side: tokens a second of the embedded engine. Run by benchmarks.common.run_ours; see peers/hf_generate.py.

python -m benchmarks.ours.decode MODEL_DIR PROMPTS.json '{"threads": 2, ...}'
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.common import quartiles, timed, versions
from rollout import Completion, SamplingParams, build_engine


@dataclass(frozen=True)
class Settings:
    """The first num_prompts prompts, a sample each."""

    threads: int = 1
    repeats: int = 10
    warmup: int = 2
    num_prompts: int = 64
    max_tokens: int = 64
    ignore_eos: bool = True
    exact: bool = False


def main(model_dir: str, prompts_file: str, settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    with open(prompts_file) as file:
        prompts = json.load(file)[: settings.num_prompts]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    engine = build_engine(model_dir, exact=settings.exact)
    params = SamplingParams(max_tokens=settings.max_tokens, ignore_eos=settings.ignore_eos)  # fresh entropy each call
    calls: list[list[list[Completion]]] = []
    seconds = timed(lambda: calls.append(engine.generate(ids, params)), settings.repeats, settings.warmup)
    lengths = [[len(c.token_ids) for group in groups for c in group] for groups in calls[settings.warmup :]]
    return {
        "side": "ours",
        "settings": asdict(settings),
        "seconds": quartiles(seconds),
        "tokens_per_second": quartiles([sum(each) / took for each, took in zip(lengths, seconds)]),
        "mean_length": sum(map(sum, lengths)) / (len(ids) * len(lengths)),
        "max_length": max(map(max, lengths)),
        "all_seconds": [round(value, 5) for value in seconds],
        "versions": versions("torch"),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])))))
