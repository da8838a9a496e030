"""Samples that are stopped and go on, with the same weights or others, against engines that were never stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model.names import hf_state
from rollout import Completion, SamplingParams, build_engine
from rollout.records import complete

PARAMS = SamplingParams(n=3, max_tokens=24, seed=7, ignore_eos=True)
WORK = [dataclasses.replace(PARAMS, seed=i, max_tokens=4 + 5 * i) for i in range(5)]


def go(engine: Any, steps: int | None = None) -> dict[int, list[Completion]]:
    """So many steps, or until everything is complete."""
    done: dict[int, list[Completion]] = {}
    left = getattr(engine, "open", None)
    while (engine.waiting or engine.running or left) if steps is None else steps > 0:
        done |= engine.step()
        steps = None if steps is None else steps - 1
        left = getattr(engine, "open", None)
    return done


def begin(engine: Any, prompts: Sequence[list[int]], work: Sequence[SamplingParams], steps: int) -> list[Any]:
    """What `steps` steps come to; nothing is left in the engine."""
    ids = [engine.add_request(prompt, params) for prompt, params in zip(prompts, work)]
    done = go(engine, steps)
    done |= engine.abort()
    assert not engine.waiting and not engine.running
    return [done[i] for i in ids]


def go_on(engine: Any, prompts: Sequence[list[int]], work: Sequence[SamplingParams], begun: Sequence[Any]) -> list[Any]:
    """Completes what is unfinished."""
    ids = {i: engine.add_request(prompts[i], work[i], begun[i]) for i in range(len(work)) if not complete(begun[i])}
    done = go(engine)
    return [done[ids[i]] if i in ids else begun[i] for i in range(len(work))]


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=2, initializer_range=0.2, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=["embedded", "exact", "small pages", "auto"])
def engine(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    if request.param == "auto":
        return build_engine(llama())
    options = {"exact": {"exact": True}, "small pages": {"page_size": 3, "max_num_seqs": 7}}.get(request.param, {})
    return build_engine(make_model(), enable_return_routed_experts=True, **options)


def other_weights(engine: Any, seed: int = 5) -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)
    if not hasattr(engine, "decoder"):
        return [(name, t + 0.05 * torch.randn_like(t)) for name, t in engine.model.state_dict().items()]
    return [(name, t + 0.05 * torch.randn_like(t)) for name, t in hf_state(engine.model)]


@pytest.mark.parametrize("stops", [(1,), (6,), (2, 3, 9)])
def test_stopped_samples_go_on_as_if_never_stopped(engine: Any, prompts: Any, stops: tuple[int, ...]) -> None:
    """The same weights: the same tokens, log-probabilities and routes, however often it was stopped."""
    given = prompts([1, 4, 9, 4, 7])
    want = engine.generate(given, WORK)
    got: list[Any] = begin(engine, given, WORK, stops[0])
    for steps in stops[1:]:
        ids = {i: engine.add_request(given[i], WORK[i], got[i]) for i in range(5) if not complete(got[i])}
        done = go(engine, steps) | engine.abort()
        got = [done[ids[i]] if i in ids else got[i] for i in range(5)]
    assert any(0 < len(c.token_ids) < 24 for group in got for c in group if c.finish_reason == "abort")
    got = go_on(engine, given, WORK, got)
    for one, other in zip((c for g in want for c in g), (c for g in got for c in g)):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert other.policy_versions == ((0, len(one.token_ids)),)
        if one.routed_experts is not None:
            assert np.array_equal(one.routed_experts, other.routed_experts)


def test_new_weights_go_on_from_the_tokens_of_the_old(engine: Any, prompts: Any) -> None:
    """What they add has the log-probabilities of a fresh forward pass over prompt and beginning; the rest stays."""
    given = prompts([1, 4, 9, 4, 7])
    begun = begin(engine, given, WORK, 6)
    engine.load_weights(other_weights(engine), 3)
    done = go_on(engine, given, WORK, begun)
    greedy = [dataclasses.replace(p, temperature=0.0) for p in WORK]
    greedily = go_on(engine, given, greedy, begun)
    for i, prompt in enumerate(given):
        for old, new, top in zip(begun[i], done[i], greedily[i]):
            start = len(old.token_ids)
            assert new.token_ids[:start] == old.token_ids and new.logprobs[:start] == old.logprobs
            assert len(new.token_ids) == len(new.logprobs) == len(new.log_support) == WORK[i].max_tokens
            added = WORK[i].max_tokens - start
            if not added:
                assert new is old and new.policy_versions == ((0, start),)
                continue
            assert new.policy_versions == (((0, start),) if start else ()) + ((3, added),)
            assert (new.policy_version, new.older_than(3), new.older_than(0)) == (3, start, 0)
            [[fresh]] = engine.generate(
                [[*prompt, *old.token_ids]], dataclasses.replace(greedy[i], n=1, max_tokens=added)
            )
            assert fresh.token_ids == top.token_ids[start:]
            np.testing.assert_allclose(fresh.logprobs, top.logprobs[start:], atol=1e-5)
            ids = torch.tensor([[*prompt, *new.token_ids]])
            with torch.no_grad():
                logprobs = engine.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            want = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(new.logprobs[start:], want[start:], atol=1e-5)
            if new.routed_experts is not None:
                assert new.routed_experts.shape[0] == len(prompt) + len(new.token_ids) - 1
                assert np.array_equal(top.routed_experts[-added:], fresh.routed_experts[-added:])


def test_a_beginning_that_does_not_fit_is_one_line(engine: Any, prompts: Any) -> None:
    [prompt] = prompts([4])
    [group] = begin(engine, [prompt], [PARAMS], 2)
    for begun in (group[:2], [dataclasses.replace(c, finish_reason="stop") for c in group]):
        with pytest.raises(ValueError, match="cannot go on from"):
            engine.add_request(prompt, PARAMS, begun)
    assert not engine.waiting
