"""A plain engine over any causal language model of transformers: for tests and runs without vLLM, right before fast.

    requests of one prompt length --prefill--> rows of a KV cache --decode, a token of each at a time--> completions

Rows are never padded, so nothing has to be masked, whatever mixes an architecture's tokens. Draws are those of the
embedded engine: a function of (seed, sample, position).
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.auto import end_tokens, load_published, published
from rollout.draws import sample_seeds, uniform
from rollout.paged.sampler import SamplingRows, sample
from rollout.records import Completion, SamplingParams, check_base, check_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class _Row:
    place: tuple[int, int]  # prompt, sample
    prompt: list[int]
    params: SamplingParams
    draws: np.ndarray  # [max_tokens] float64
    drawn: list[tuple[int, float, float]] = field(default_factory=list)  # token, logprob, log_support


class AutoEngine:
    """See rollout.engine.Engine."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_num_seqs: int = 256,
        exact: bool = False,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        """exact: a sequence at a time, so that none feels another."""
        self.model: Any = model.eval()
        self.eos_token_ids = frozenset(end_tokens(model) if eos_token_ids is None else eos_token_ids)
        self.batch = 1 if exact else max_num_seqs
        self.max_model_len, self.vocab_size = int(model.config.max_position_embeddings), int(model.config.vocab_size)
        known = inspect.signature(self.model.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"  # the latter before transformers 5.2x
        self.policy_version = 0
        self.queued: dict[int, tuple[Sequence[int], SamplingParams]] = {}
        self._next_id = 0

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """See Engine."""
        check_prompt("the prompt", prompt, params, self.vocab_size, self.max_model_len)
        self.queued[self._next_id] = prompt, params
        self._next_id += 1
        return self._next_id - 1

    def step(self) -> dict[int, list[Completion]]:
        """Samples everything that is queued."""
        queued, self.queued = self.queued, {}
        prompts, params = zip(*queued.values())
        return dict(zip(queued, self.generate(prompts, params)))

    def abort(self) -> None:
        """See Engine."""
        self.queued = {}

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, base: int | None = None) -> None:
        """See Engine. Raises ValueError for missing, unknown or misshapen tensors; then nothing has changed."""
        check_base(self.policy_version, version, base)
        load_published(self.model, weights if base is None else (dict(published(self.model)) | dict(weights)).items())
        self.policy_version = version

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See Engine."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
        for number, (prompt, wanted) in enumerate(zip(prompts, each)):
            check_prompt(f"prompt {number}", prompt, wanted, self.vocab_size, self.max_model_len)
        rows = [row for i, (prompt, wanted) in enumerate(zip(prompts, each)) for row in self._rows(i, prompt, wanted)]
        rows.sort(key=lambda row: len(row.prompt))  # stable: the samples of a prompt stay together
        results: dict[tuple[int, int], Completion] = {}
        for _, same in groupby(rows, key=lambda row: len(row.prompt)):
            batch = list(same)
            for start in range(0, len(batch), self.batch):
                results.update(self._decode(batch[start : start + self.batch]))
        return [[results[i, index] for index in range(wanted.n)] for i, wanted in enumerate(each)]

    def _rows(self, number: int, prompt: Sequence[int], params: SamplingParams) -> Iterator[_Row]:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        positions = np.arange(params.max_tokens)
        for index, own in enumerate(sample_seeds(seed, params.n)):
            draws = uniform(own.repeat(len(positions)), positions)
            yield _Row((number, index), list(prompt), params, draws)

    def _decode(self, rows: list[_Row]) -> Iterator[tuple[tuple[int, int], Completion]]:
        """Rows of one prompt length, until each has ended."""
        from transformers import DynamicCache

        numbers = sorted({row.place[0] for row in rows})  # a prompt is computed once
        prompts = {row.place[0]: row.prompt for row in rows}
        cache = DynamicCache(config=self.model.config)
        logits = self._forward([prompts[number] for number in numbers], cache)
        owner = torch.tensor([numbers.index(row.place[0]) for row in rows], device=logits.device)
        logits = logits[owner]
        cache.batch_select_indices(owner)
        while True:
            settings = SamplingRows.of([row.params for row in rows], logits.shape[-1], logits.device)
            draws = np.array([row.draws[len(row.drawn)] for row in rows])
            for row, drawn in zip(rows, zip(*(t.tolist() for t in sample(logits, settings, draws)))):
                row.drawn.append(drawn)
            ends = [self._reason(row) for row in rows]
            yield from ((row.place, self._completion(row, end)) for row, end in zip(rows, ends) if end)
            going = [at for at, end in enumerate(ends) if not end]
            if not going:
                return
            if len(going) < len(rows):
                rows = [rows[at] for at in going]
                cache.batch_select_indices(torch.tensor(going, device=logits.device))
            logits = self._forward([[row.drawn[-1][0]] for row in rows], cache)

    def _forward(self, tokens: list[list[int]], cache: Any) -> torch.Tensor:
        """Logits [B, V] after these tokens of each row, which join the cache."""
        ids = torch.tensor(tokens, device=self.model.device)
        out = self.model.base_model(input_ids=ids, use_cache=True, **{self.cache_name: cache})
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1])

    def _reason(self, row: _Row) -> str:
        token, params = row.drawn[-1][0], row.params
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        return "length" if len(row.drawn) == params.max_tokens else ""

    def _completion(self, row: _Row, reason: Any) -> Completion:
        tokens, logprobs, support = zip(*row.drawn)
        return Completion(tokens, logprobs, support, reason, self.policy_version)
