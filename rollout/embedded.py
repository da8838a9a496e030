"""The embedded engine: continuous batching over a paged cache of MLA latents, on any device torch has.

    waiting prompts --prefill (once a prompt)--> G running samples that share its pages --decode--> completions

Requests join as soon as there is room and leave as soon as they end. Pages for the longest completion a sample may
have are set aside when it is admitted, so nothing is ever evicted. A draw depends on (seed, sample, position) alone.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from model import DeepseekV3ForCausalLM, SequenceLayout
from model.names import load_hf_state
from rollout.draws import sample_seeds, uniform
from rollout.paged.decoder import PagedDecoder
from rollout.paged.pages import PagePool
from rollout.paged.sampler import SamplingRows, sample
from rollout.records import Completion, SamplingParams, begun_samples, check_base


@dataclass(slots=True)
class _Request:
    id: int
    prompt: list[int]
    params: SamplingParams
    draws: np.ndarray  # [n, max_tokens] float64: the random number of each token of each sample
    stop: frozenset[int]
    samples: list[Completion]  # as far as they are known here: unfinished ones are running, or wait to

    @property
    def open(self) -> list[int]:
        """Samples that are not finished."""
        return [index for index, sample in enumerate(self.samples) if sample.finish_reason == "abort"]


@dataclass(slots=True)
class _Running:
    request: _Request
    index: int  # which sample of the request
    pages: list[int]
    drawn: list[tuple[int, float, float]] = field(default_factory=list)  # token, logprob, log_support
    experts: list[np.ndarray] = field(default_factory=list)  # [tokens, L_moe, K] each

    @property
    def begun(self) -> Completion:
        """What it goes on from."""
        return self.request.samples[self.index]

    @property
    def length(self) -> int:
        """Tokens of the completion so far."""
        return len(self.begun.token_ids) + len(self.drawn)


class EmbeddedEngine:
    """See rollout.engine.Engine. Also usable as a stream: `add_request`, then `step` until nothing is unfinished."""

    def __init__(
        self,
        model: DeepseekV3ForCausalLM,
        max_num_seqs: int = 256,
        page_size: int = 16,
        num_pages: int = 0,
        exact: bool = False,
        enable_return_routed_experts: bool = False,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        """num_pages 0: as many as max_num_seqs samples of the longest request so far need."""
        self.model = model.eval()
        self.max_num_seqs, self.page_size, self.num_pages = max_num_seqs, page_size, num_pages
        self.return_routed_experts, self.exact = enable_return_routed_experts, exact
        self.max_model_len = model.config.max_position_embeddings
        self.eos_token_ids = frozenset(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self.decoder = PagedDecoder(model, page_size, exact)
        self.policy_version = 0
        self.whole = True  # False once a load has failed: the weights are then of two versions
        self.pool = PagePool(0)
        self.table_width = 0
        self._reset()

    def _reset(self) -> None:
        self.waiting: deque[_Request] = deque()
        self.running: list[_Running] = []
        self._next_id = 0
        self._batch: _Batch | None = None  # tensors of `running`; None: to be built anew

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, base: int | None = None) -> None:
        """See Engine. Raises ValueError for missing, unknown or misshapen tensors; then nothing is sampled until a
        complete set has come."""
        assert not self.running and not self.waiting, "weights change between generations only"
        if base is not None and not self.whole:
            raise ValueError("the last set of weights was incomplete; load a complete one first")
        check_base(self.policy_version, version, base)
        self.whole = False
        loader = load_hf_state(self.model, weights, strict=base is None)
        if loader.unexpected:
            raise ValueError(f"{loader.unexpected[0]} is no tensor of the model that the engine was built from")
        self.whole = True
        self.decoder.refresh()
        self.policy_version = version

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if self.waiting or self.running:
            raise ValueError("requests of add_request are unfinished; call step until they are done")
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each")
        for i, (prompt, p) in enumerate(zip(prompts, each)):
            self._check(prompt, p, f"prompt {i}")  # all of them before any work
        ids = [self.add_request(prompt, p) for prompt, p in zip(prompts, each)]
        results: dict[int, list[Completion]] = {}
        try:
            while self.waiting or self.running:
                results.update(self.step())
        except BaseException:
            self.abort()
            raise
        return [results[i] for i in ids]

    def add_request(self, prompt: Sequence[int], params: SamplingParams, begun: Sequence[Completion] = ()) -> int:
        """See Engine."""
        self._check(prompt, params, "the prompt")
        samples = begun_samples(begun, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        seeds, positions = sample_seeds(seed, params.n), np.arange(params.max_tokens)
        draws = uniform(seeds.repeat(len(positions)), np.tile(positions, len(seeds))).reshape(params.n, -1)
        request = _Request(self._next_id, list(prompt), params, draws, stop, samples)
        self._next_id += 1
        self.waiting.append(request)
        return request.id

    def step(self) -> dict[int, list[Completion]]:
        """Admits what fits, decodes one token of every running sample, and returns the requests that are complete."""
        finished = self._admit()
        if self.running:
            finished += self._decode()
        complete = {}
        for sequence in finished:
            if not sequence.request.open:
                complete[sequence.request.id] = sequence.request.samples
        return complete

    def _check(self, prompt: Sequence[int], params: SamplingParams, name: str) -> None:
        vocab = self.model.config.vocab_size
        if not self.whole:
            raise ValueError("the last set of weights was incomplete; load a complete one first")
        if len(prompt) == 0:
            raise ValueError(f"{name} has no tokens")
        bad = [t for t in prompt if not isinstance(t, int | np.integer) or not 0 <= t < vocab]
        if bad:
            raise ValueError(f"{name} has the token id {bad[0]!r}; ids are whole numbers from 0 to {vocab - 1}")
        total = len(prompt) + params.max_tokens
        if total > self.max_model_len:
            raise ValueError(
                f"{name} has {len(prompt)} tokens and max_tokens is {params.max_tokens}: {total} are more than the "
                f"context of {self.max_model_len}; shorten the prompt or max_tokens"
            )
        if params.n > self.max_num_seqs:
            raise ValueError(f"{name} asks for n={params.n} samples; max_num_seqs is {self.max_num_seqs}")
        need = self._pages_of(len(prompt), params.max_tokens, params.n)
        if self.num_pages and need > self.num_pages:
            raise ValueError(f"{name} needs {need} cache pages; num_pages is {self.num_pages}: raise it")

    def _pages_of(self, prompt_length: int, max_tokens: int, samples: int) -> int:
        """Pages of a request: the full pages of its prompt once, the rest for every sample. The last token drawn is
        never fed back, so it needs no slot."""
        shared = prompt_length // self.page_size
        own = -(-(prompt_length + max_tokens - 1) // self.page_size) - shared
        return shared + own * samples

    def _grow(self) -> None:
        """With nothing running: a table and, where num_pages is free to choose, a pool for the longest request."""
        longest = max(len(r.prompt) + r.params.max_tokens for r in self.waiting)
        width = -(-self.max_model_len // self.page_size) if self.exact else -(-longest // self.page_size)
        pages = self.num_pages or max(
            self.max_num_seqs * -(-longest // self.page_size),
            max(self._pages_of(len(r.prompt), r.params.max_tokens, len(r.open)) for r in self.waiting),
        )
        if width > self.table_width:
            self.table_width = width
        if pages > len(self.pool.holders):
            self.pool = PagePool(pages)
            self.decoder.reserve(pages)

    def _admit(self) -> list[_Running]:
        if not self.waiting:
            return []
        if not self.running:
            self._grow()
        room, admitted = self.max_num_seqs - len(self.running), []
        free = len(self.pool.free)
        while self.waiting:
            request = self.waiting[0]
            samples = len(request.open)
            need = self._pages_of(len(request.prompt), request.params.max_tokens, samples)
            too_long = len(request.prompt) + request.params.max_tokens > self.table_width * self.page_size
            if samples > room or need > free or too_long:
                break
            room, free = room - samples, free - need
            admitted.append(self.waiting.popleft())
        if self.exact:  # one prompt at a time, so that none feels another
            return [sequence for request in admitted for sequence in self._prefill([request])]
        return self._prefill(admitted) if admitted else []

    def _prefill(self, requests: list[_Request]) -> list[_Running]:
        """Computes prompts once each, and after them what samples had begun; gives every sample its pages and draws
        its next token; returns what ended."""
        size, device = self.page_size, self.model.device
        pieces: list[tuple[Sequence[int], np.ndarray, int]] = []  # tokens, their slots, the piece they follow or -1
        sequences, owner, copies = [], [], []  # owner: the piece at whose end a sequence goes on
        for request in requests:
            length, prompt = len(request.prompt), len(pieces)
            full = length // size
            shared = self.pool.take(full)
            own = -(-(length + request.params.max_tokens - 1) // size) - full
            first: list[int] = []
            for index in request.open:
                pages = (self.pool.share(shared) if first else shared) + self.pool.take(own)
                if not first:
                    first = pages
                    pieces.append((request.prompt, self._slots(pages, 0, length), -1))
                elif length % size:
                    copies.append((first[full], pages[full], length % size))
                sequences.append(_Running(request, index, pages))
                begun = request.samples[index].token_ids
                if begun:
                    pieces.append((begun, self._slots(pages, length, len(begun)), prompt))
                owner.append(len(pieces) - 1 if begun else prompt)
        cu_seqlens = np.concatenate(([0], np.cumsum([len(tokens) for tokens, _, _ in pieces])))
        parents = np.array([follows for _, _, follows in pieces])
        layout = SequenceLayout.from_segments(cu_seqlens, parents).to(device)
        ids = torch.tensor([t for tokens, _, _ in pieces for t in tokens], device=device)
        slots = torch.from_numpy(np.concatenate([where for _, where, _ in pieces])).to(device)
        hidden, experts = self.decoder.prefill(ids, layout, slots)
        if copies:  # the prompt's last, half-filled page: each sample goes on in a copy of its own
            src = np.concatenate([a * size + np.arange(n) for a, _, n in copies])
            dst = np.concatenate([b * size + np.arange(n) for _, b, n in copies])
            with torch.inference_mode():
                picked = self.decoder.cache[:, torch.from_numpy(src).to(device)]
                self.decoder.cache[:, torch.from_numpy(dst).to(device)] = picked
        if self.return_routed_experts:
            parts = np.split(self._compact(experts), cu_seqlens[1:-1])
            for sequence, piece in zip(sequences, owner):
                sequence.experts += [parts[i] for i in (parents[piece], piece) if i >= 0]
        used, row = np.unique(owner, return_inverse=True)
        logits = self.decoder.logits(hidden[torch.from_numpy(cu_seqlens[1:][used] - 1).to(device)])
        rows = SamplingRows.of([s.request.params for s in sequences], logits.shape[-1], device)
        ended = self._draw(sequences, logits[torch.from_numpy(row).to(device)], rows)
        self.running += [s for s in sequences if s.pages]
        self._batch = None
        return ended

    def _slots(self, pages: list[int], start: int, count: int) -> np.ndarray:
        """[count] cache slots of the positions from `start` on of a sequence that has these pages."""
        where = np.arange(start, start + count)
        return np.array(pages)[where // self.page_size] * self.page_size + where % self.page_size

    def _decode(self) -> list[_Running]:
        batch = self._batch or _Batch(self)
        hidden, experts = self.decoder.decode(*batch.inputs())
        if self.return_routed_experts:
            for sequence, row in zip(self.running, self._compact(experts)):
                sequence.experts.append(row[None])
        ended = self._draw(self.running, self.decoder.logits(hidden), batch.rows)
        if ended:
            keep = [i for i, s in enumerate(self.running) if s.pages]
            self.running = [self.running[i] for i in keep]
            batch.keep(keep, self)
        batch.advance([s.drawn[-1][0] for s in self.running])
        self._batch = batch
        return ended

    def _draw(self, sequences: list[_Running], logits: torch.Tensor, rows: SamplingRows) -> list[_Running]:
        """Draws the next token of each sequence; returns those that ended (their pages released)."""
        draws = np.array([s.request.draws[s.index, s.length] for s in sequences])
        ended = []
        for sequence, drawn in zip(sequences, zip(*(t.tolist() for t in sample(logits, rows, draws)))):
            sequence.drawn.append(drawn)
            request = sequence.request
            if drawn[0] in request.stop:
                ended.append(self._finish(sequence, "stop"))
            elif sequence.length == request.params.max_tokens:
                ended.append(self._finish(sequence, "length"))
        return ended

    def _compact(self, experts: torch.Tensor) -> np.ndarray:
        return experts.cpu().numpy().astype(np.uint8 if self.model.config.n_routed_experts <= 256 else np.int16)

    def _finish(self, sequence: _Running, reason: Any) -> _Running:
        tokens, logprobs, log_support = zip(*sequence.drawn)
        routed = np.concatenate(sequence.experts) if self.return_routed_experts and reason != "abort" else None
        sequence.request.samples[sequence.index] = sequence.begun.extended(
            tokens, logprobs, log_support, reason, self.policy_version, routed
        )
        self.pool.release(sequence.pages)
        sequence.pages = []
        return sequence

    def abort(self) -> dict[int, list[Completion]]:
        """See Engine."""
        open_requests = [sequence.request for sequence in self.running] + list(self.waiting)
        for sequence in self.running:
            self._finish(sequence, "abort")
        self._reset()
        return {request.id: request.samples for request in open_requests}


class _Batch:
    """The tensors of a decode step; they change a little from step to step instead of being built anew."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.device, self.page_size, self.exact = engine.model.device, engine.page_size, engine.exact
        running = engine.running
        table = np.zeros((len(running), engine.table_width), dtype=np.int64)
        for row, sequence in zip(table, running):
            row[: len(sequence.pages)] = sequence.pages
        self.pages = torch.from_numpy(table).to(self.device)  # [B, P]
        self.positions = np.array([len(s.request.prompt) + s.length - 1 for s in running])
        self.tokens = [s.drawn[-1][0] for s in running]
        self._settings(engine)

    def _settings(self, engine: EmbeddedEngine) -> None:
        vocab = engine.model.config.vocab_size
        self.rows = SamplingRows.of([s.request.params for s in engine.running], vocab, self.device)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Newest tokens [B], their positions [B], and as many columns of the page table as the longest one needs."""
        positions = torch.from_numpy(self.positions).to(self.device)
        used = self.pages.shape[1] if self.exact else int(self.positions.max()) // self.page_size + 1
        return torch.tensor(self.tokens, device=self.device), positions, self.pages[:, :used].contiguous()

    def keep(self, rows: list[int], engine: EmbeddedEngine) -> None:
        self.positions = self.positions[rows]
        self.pages = self.pages[torch.tensor(rows, dtype=torch.int64, device=self.device)]
        if rows:
            self._settings(engine)

    def advance(self, tokens: list[int]) -> None:
        self.positions = self.positions + 1
        self.tokens = tokens
