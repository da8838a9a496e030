"""A plain engine over any causal language model of transformers: for tests and runs without vLLM, right before fast.

    samples of one length --prefill--> rows of a KV cache --decode, a token of each at a time--> completions

Rows are never padded, so nothing has to be masked, whatever mixes an architecture's tokens. Draws are those of the
embedded engine: a function of (seed, sample, position).
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.auto import end_tokens, load_published, published
from rollout.draws import sample_seeds, uniform
from rollout.paged.sampler import SamplingRows, sample
from rollout.records import Completion, SamplingParams, begun_samples, check_base, check_prompt, complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class _Row:
    place: tuple[int, int]  # request, sample
    prompt: list[int]  # and what the sample had begun
    params: SamplingParams
    draws: np.ndarray  # [max_tokens - tokens begun] float64
    begun: Completion
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
        self._next_id = 0
        self._reset()

    def _reset(self) -> None:
        self.open: dict[int, list[Completion]] = {}  # requests that step has not returned: their samples so far
        self.waiting: list[_Row] = []
        self.running: list[_Row] = []
        self.decoding: Iterator[list[tuple[_Row, str]]] = iter(())

    def add_request(self, prompt: Sequence[int], params: SamplingParams, begun: Sequence[Completion] = ()) -> int:
        """See Engine."""
        check_prompt("the prompt", prompt, params, self.vocab_size, self.max_model_len)
        number, self._next_id = self._next_id, self._next_id + 1
        self.open[number] = begun_samples(begun, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        for index, (own, so_far) in enumerate(zip(sample_seeds(seed, params.n), self.open[number])):
            if so_far.finish_reason == "abort":
                positions = np.arange(len(so_far.token_ids), params.max_tokens)
                draws = uniform(own.repeat(len(positions)), positions)
                self.waiting.append(_Row((number, index), [*prompt, *so_far.token_ids], params, draws, so_far))
        return number

    @torch.inference_mode()
    def step(self) -> dict[int, list[Completion]]:
        """See Engine. Rows of one length at a time, the shortest first."""
        if not self.running:
            self.waiting.sort(key=lambda row: len(row.prompt))  # stable: the samples of a prompt stay together
            length = len(self.waiting[0].prompt)
            self.running = [row for row in self.waiting[: self.batch] if len(row.prompt) == length]
            del self.waiting[: len(self.running)]
            self.decoding = self._decode(self.running)
        done: dict[int, list[Completion]] = {}
        for row, reason in next(self.decoding):
            number, index = row.place
            self.open[number][index] = self._completion(row, reason)
            if complete(self.open[number]):
                done[number] = self.open.pop(number)
        return done

    def abort(self) -> dict[int, list[Completion]]:
        """See Engine."""
        for row in self.running:
            if row.drawn:
                self.open[row.place[0]][row.place[1]] = self._completion(row, "abort")
        stopped = self.open
        self._reset()
        return stopped

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, base: int | None = None) -> None:
        """See Engine. Raises ValueError for missing, unknown or misshapen tensors; then nothing has changed."""
        check_base(self.policy_version, version, base)
        load_published(self.model, weights if base is None else (dict(published(self.model)) | dict(weights)).items())
        self.policy_version = version

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See Engine."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if self.open:
            raise ValueError("requests of add_request are unfinished; call step until they are done")
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
        for number, (prompt, wanted) in enumerate(zip(prompts, each)):
            check_prompt(f"prompt {number}", prompt, wanted, self.vocab_size, self.max_model_len)
        ids = [self.add_request(prompt, wanted) for prompt, wanted in zip(prompts, each)]
        results: dict[int, list[Completion]] = {}
        try:
            while self.open:
                results.update(self.step())
        except BaseException:
            self.abort()
            raise
        return [results[i] for i in ids]

    def _decode(self, rows: list[_Row]) -> Iterator[list[tuple[_Row, str]]]:
        """Rows of one length, until each has ended -> after each token, those that ended and why."""
        from transformers import DynamicCache

        # a prompt is computed once; what a sample has begun is its own
        owners = [(row.place[0], row.place[1] if row.begun.token_ids else -1) for row in rows]
        prompts = dict(sorted(dict(zip(owners, (row.prompt for row in rows))).items()))
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(list(prompts.values()), cache)
        places = {owner: at for at, owner in enumerate(prompts)}
        owner = torch.tensor([places[owner] for owner in owners], device=logits.device)
        logits = logits[owner]
        cache.batch_select_indices(owner)
        while True:
            settings = SamplingRows.of([row.params for row in rows], logits.shape[-1], logits.device)
            draws = np.array([row.draws[len(row.drawn)] for row in rows])
            for row, drawn in zip(rows, zip(*(t.tolist() for t in sample(logits, settings, draws)))):
                row.drawn.append(drawn)
            ends = [self._reason(row) for row in rows]
            going = [at for at, end in enumerate(ends) if not end]
            self.running = [rows[at] for at in going]
            yield [(row, end) for row, end in zip(rows, ends) if end]
            if len(going) < len(rows):
                rows = self.running
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
        return "length" if len(row.drawn) == len(row.draws) else ""

    def _completion(self, row: _Row, reason: Any) -> Completion:
        tokens, logprobs, support = zip(*row.drawn)
        return row.begun.extended(tokens, logprobs, support, reason, self.policy_version)
