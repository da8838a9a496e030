"""Peer: tokens a second of transformers' `generate`. Run by benchmarks.common.run_peer in .venv-peers.

python -m benchmarks.peers.hf_generate MODEL_DIR PROMPTS.json '{"threads": 2, ...}'
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import quartiles, timed, versions


@dataclass(frozen=True)
class Settings:
    """The first num_prompts prompts, num_generations samples of each."""

    threads: int = 1
    experts: str = "grouped_mm"  # transformers' experts_implementation
    repeats: int = 10
    warmup: int = 2
    num_prompts: int = 64
    num_generations: int = 1
    max_tokens: int = 64
    ignore_eos: bool = True  # every completion has max_tokens tokens; False: the end token ends it
    cache: str = "dynamic"  # or static
    seed: int = 0


def main(model_dir: str, prompts_file: str, settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    with open(prompts_file) as file:
        prompts = json.load(file)[: settings.num_prompts]
    assert len(prompts) == settings.num_prompts, f"{len(prompts)=}"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, experts_implementation=settings.experts
    ).eval()
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    options: dict[str, Any] = {} if settings.cache == "dynamic" else {"cache_implementation": settings.cache}
    # Without a floor on the length `generate` has no end token to suppress: the fixed case does not pay for one.
    eos = None if settings.ignore_eos else tokenizer.eos_token_id
    if settings.ignore_eos:
        model.generation_config.eos_token_id = None
    lengths: list[torch.Tensor] = []  # of the completions of each call

    def generate() -> None:
        tokens = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=settings.max_tokens,
            num_return_sequences=settings.num_generations,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )[:, inputs["input_ids"].shape[1] :]
        full = torch.full((len(tokens),), tokens.shape[1])
        ended = tokens == (-1 if eos is None else eos)
        lengths.append(torch.where(ended.any(1), ended.int().argmax(1) + 1, full))

    torch.manual_seed(settings.seed)
    with torch.inference_mode():
        seconds = timed(generate, settings.repeats, settings.warmup)
    counted = torch.stack(lengths[settings.warmup :])  # [repeats, sequences]
    return {
        "peer": "transformers",
        "settings": asdict(settings),
        "seconds": quartiles(seconds),
        "tokens_per_second": quartiles([count / took for count, took in zip(counted.sum(1).tolist(), seconds)]),
        "mean_length": counted.float().mean().item(),
        "max_length": counted.max().item(),
        "all_seconds": [round(value, 5) for value in seconds],
        "versions": versions("torch", "transformers"),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])))))
