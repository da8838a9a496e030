"""Real vLLM: requests that are stopped on the way and go on under other weights."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import DeepseekV3ForCausalLM
from model.names import hf_state
from rollout import SamplingParams, build_engine
from rollout.records import complete

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 20, "kv_cache_gb": 0.03}
PROMPTS = [np.random.default_rng(i).integers(3, 96, 2 + 3 * i % 23).tolist() for i in range(9)]
PARAMS = [SamplingParams(n=3, top_p=0.9, max_tokens=4 + 6 * i, seed=i, ignore_eos=True) for i in range(9)]


@pytest.fixture(scope="module")
def directory(vllm_tiny: Any) -> Path:
    return vllm_tiny()


@pytest.fixture(scope="module")
def engine(directory: Path) -> Any:
    return build_engine(directory, "vllm", enable_return_routed_experts=True, **OPTIONS)


def stopped(engine: Any, steps: int, begun: Any = None) -> list[Any]:
    """What so many steps come to."""
    begun = begun or [()] * len(PROMPTS)
    ids = {engine.add_request(PROMPTS[i], PARAMS[i], b): i for i, b in enumerate(begun) if not b or not complete(b)}
    done: dict[int, Any] = {}
    for _ in range(steps):
        done |= engine.step() if engine.open else {}
    done |= engine.abort()
    assert not engine.open and not engine.engine.has_unfinished_requests()
    places = {i: number for number, i in ids.items()}
    return [done[places[i]] if i in places else b for i, b in enumerate(begun)]


def test_a_stopped_request_has_what_it_would_have_begun_with(engine: Any) -> None:
    """27 samples in 20 places: some finished, some on the way, some not begun. Tokens and numbers are those of a run
    that was not stopped."""
    whole = engine.generate(PROMPTS, PARAMS)
    begun = stopped(engine, 12)
    lengths = [len(c.token_ids) for group in begun for c in group if c.finish_reason == "abort"]
    assert 0 in lengths and max(lengths) > 5 and any(complete(group) for group in begun)
    for group, want in zip(begun, whole):
        for c, w in zip(group, want):
            count = len(c.token_ids)
            assert c.token_ids == w.token_ids[:count] and len(c.logprobs) == len(c.log_support) == count
            np.testing.assert_allclose(c.logprobs, w.logprobs[:count], atol=1e-5)
            np.testing.assert_allclose(c.log_support, w.log_support[:count], atol=1e-5)
    again = stopped(engine, 12)
    assert again == begun  # nothing of the first time is left


def test_new_weights_go_on_from_the_tokens_of_the_old(engine: Any, directory: Path) -> None:
    """The log-probabilities, support and routes of what they add are a fresh forward pass's."""
    policy = DeepseekV3ForCausalLM.from_pretrained(directory)
    begun = stopped(engine, 12)
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in policy.state_dict().values():
            tensor += 0.05 * torch.randn_like(tensor)
    engine.load_weights([(name, tensor.clone()) for name, tensor in hf_state(policy)], 4)
    halfway = stopped(engine, 5, begun)
    done = stopped(engine, 1000, halfway)
    embedded = build_engine(policy, enable_return_routed_experts=True)
    checked = 0
    for prompt, params, old, new in zip(PROMPTS, PARAMS, begun, done):
        assert complete(new)
        for a, b in zip(old, new):
            start, count = len(a.token_ids), len(b.token_ids)
            assert b.token_ids[:start] == a.token_ids and b.logprobs[:start] == a.logprobs
            assert count == params.max_tokens
            assert b.policy_versions == tuple(run for run in ((0, start), (4, count - start)) if run[1])
            if start == count:
                continue
            ids = torch.tensor([[*prompt, *b.token_ids]])
            with torch.no_grad():
                rows = policy(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            want = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(b.logprobs[start:], want[start:], atol=1e-4)
            for row, kept in zip(rows[start:], b.log_support[start:]):
                mass = row.exp().sort(descending=True).values
                assert kept == pytest.approx(float(mass[: int((mass.cumsum(0) < 0.9).sum()) + 1].sum().log()), abs=1e-3)
            assert b.routed_experts is not None and len(b.routed_experts) == len(prompt) + count - 1
            greedy = dataclasses.replace(params, n=1, temperature=0.0, top_p=1.0, max_tokens=1)
            [[fresh]] = embedded.generate([[*prompt, *b.token_ids[:-1]]], greedy)
            assert np.array_equal(np.sort(fresh.routed_experts, -1), np.sort(b.routed_experts, -1))
            checked += 1
    assert checked > 10


def test_a_continuation_has_draws_of_its_own(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed of a request that goes on is a function of the sample's and of where it does, and not the first one:
    vLLM would draw the numbers of the first tokens again."""
    given: list[tuple[int, int]] = []
    add = engine.engine.add_request
    monkeypatch.setattr(
        engine.engine,
        "add_request",
        lambda *args, **kwargs: given.append((args[2].seed, args[2].max_tokens)) or add(*args, **kwargs),
    )
    begun = stopped(engine, 3)
    first, given[:] = list(given), []
    for _ in range(2):
        stopped(engine, 0, begun)
    half = len(given) // 2
    assert given[:half] == given[half:] and half > 10
    samples = [c for group in begun if not complete(group) for c in group if c.finish_reason == "abort"]
    begun_too = {pair for pair, c in zip(given, samples, strict=False) if c.token_ids}
    assert len(begun_too) >= 15 and not {seed for seed, _ in begun_too} & {seed for seed, _ in first}
    assert {pair for pair, c in zip(given, samples, strict=False) if not c.token_ids} <= set(first)
