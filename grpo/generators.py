"""What generative rewards write with: an embedded engine over a model directory, loaded when it is first asked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.config import ConfigError, digest
from model.family import read_config
from rollout import SamplingParams, build_engine
from rollout.draws import seed_of


class EngineGenerator:
    """Text in, text out. A draw depends on (seed, prompt, how often the call had it before), not on the batch."""

    def __init__(
        self,
        model_dir: str | Path,
        options: Mapping[str, Any],
        load_tokenizer: Callable[[Path], Any],
        dtype: str = "float32",
    ) -> None:
        """`options`: temperature (0: greedy), max_tokens, seed, chat (prompts go through the chat template).

        Checks the directory; weights are read by the first call. Raises ValueError for what is wrong with it.
        """
        self.path = Path(model_dir)
        if not (self.path / "config.json").is_file():
            raise ConfigError(
                f"rewards.generative_reward.model {str(model_dir)!r} is no model directory (no config.json); check it"
            )
        self.context = read_config(self.path).max_position_embeddings
        if options["max_tokens"] >= self.context:
            raise ConfigError(
                f"rewards.generative_reward.max_tokens {options['max_tokens']} leaves no room for a question in the "
                f"context of {self.context}; lower it"
            )
        self.tokenizer = load_tokenizer(self.path)
        if options["chat"] and not self.tokenizer.chat_template:
            raise ConfigError(
                f"rewards.generative_reward.chat is true, but the tokenizer of {self.path} has no chat template"
            )
        self.options, self.dtype = dict(options), dtype
        files = [*sorted(self.path.glob("*.safetensors")), self.path / "config.json", self.path / "tokenizer.json"]
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        self.version = digest(states)  # verdicts of other weights at this path are other verdicts
        self._engine: Any = None
        self._lock = threading.Lock()  # an engine serves one call at a time

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """A text to each prompt; None where it does not fit into the context, or has not ended after max_tokens."""
        with self._lock:
            if self._engine is None:
                self._engine = build_engine(self.path, dtype=getattr(torch, self.dtype))
            seen = Counter[str]()
            texts: list[str | None] = [None] * len(prompts)
            places, token_ids, params = [], [], []
            for place, prompt in enumerate(prompts):
                ids = self._encode(prompt)
                if 0 < len(ids) <= self.context - self.options["max_tokens"]:
                    places.append(place)
                    token_ids.append(ids)
                    params.append(
                        SamplingParams(
                            temperature=self.options["temperature"],
                            max_tokens=self.options["max_tokens"],
                            seed=seed_of(self.options["seed"], "generator", prompt, seen[prompt]),
                        )
                    )
                seen[prompt] += 1
            for place, [completion] in zip(places, self._engine.generate(token_ids, params)):
                if completion.finish_reason == "stop":
                    texts[place] = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            return texts

    def close(self) -> None:
        """Free the weights; the next call reads them again."""
        with self._lock:
            self._engine = None

    def _encode(self, prompt: str) -> list[int]:
        if self.options["chat"]:
            chat = [{"role": "user", "content": prompt}]
            prompt = str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
