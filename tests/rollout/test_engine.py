"""The embedded engine against the dense model, and against itself: whatever else is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model import DeepseekV3ForCausalLM, SequenceLayout
from model.names import hf_state
from rollout import Completion, SamplingParams, build_engine
from rollout.embedded import EmbeddedEngine

MakeModel = Callable[..., DeepseekV3ForCausalLM]
MakePrompts = Callable[[list[int]], list[list[int]]]
MANY_EXPERTS = {"n_routed_experts": 128, "n_group": 8}  # 128 x 16: tokens are sorted by expert


@torch.no_grad()
def dense_logprobs(model: DeepseekV3ForCausalLM, prompt: list[int], completion: Completion) -> torch.Tensor:
    tokens = torch.tensor([*prompt, *completion.token_ids])
    logprobs = model(tokens[None]).logits[0].float().log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]


def assert_dense(
    engine: EmbeddedEngine, prompts: list[list[int]], results: list[list[Completion]], atol: float = 2e-5
) -> None:
    for prompt, group in zip(prompts, results):
        for c in group:
            expected = dense_logprobs(engine.model, prompt, c)
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=atol, rtol=0)
            assert c.log_support == (0.0,) * len(c.token_ids)


def build(model: DeepseekV3ForCausalLM, **options: Any) -> EmbeddedEngine:
    engine = build_engine(model, **options)
    assert isinstance(engine, EmbeddedEngine)
    return engine


def assert_all_free(engine: EmbeddedEngine) -> None:
    assert sorted(engine.pool.free) == list(range(len(engine.pool.holders)))
    assert not any(engine.pool.holders) and not engine.running and not engine.waiting


def seeded(count: int, **settings: object) -> list[SamplingParams]:
    return [dataclasses.replace(SamplingParams(ignore_eos=True), seed=i, **settings) for i in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"n_group": 1, "topk_group": 1},
        {"rope_scaling": None},
        MANY_EXPERTS,
        {"kv_lora_rank": 32},  # wide against the heads: kv_b_proj absorbed, not folded into its neighbours
        {"kv_lora_rank": 32, "q_lora_rank": None, "n_shared_experts": 0},
        {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"first_k_dense_replace": 3},  # no mixture at all
    ],
    ids=str,
)
@pytest.mark.parametrize("exact", [False, True])
def test_decode_equals_the_dense_model(
    make_model: MakeModel, prompts: MakePrompts, changes: dict[str, object], exact: bool
) -> None:
    engine = build(make_model(**changes), page_size=4, exact=exact)
    given = prompts([1, 3, 9, 14])
    few = engine.generate(given, SamplingParams(n=2, max_tokens=20, seed=1, ignore_eos=True))
    assert_dense(engine, given, few)
    many = engine.generate(given, SamplingParams(n=10, max_tokens=4, seed=2, ignore_eos=True))
    assert_dense(engine, given, many)  # a large batch takes another way through the experts
    assert_all_free(engine)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_page_boundaries(make_model: MakeModel, prompts: MakePrompts, page_size: int) -> None:
    engine = build(make_model(), page_size=page_size)
    given = prompts([1, 3, 4, 5, 15, 16, 17, 31, 32, 33])
    for max_tokens in (1, 2, page_size, page_size + 1, 18):
        results = engine.generate(given, SamplingParams(n=2, max_tokens=max_tokens, seed=3, ignore_eos=True))
        assert_dense(engine, given, results)
        assert_all_free(engine)


def test_the_context_can_be_filled_to_the_last_token(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine = build(make_model(max_position_embeddings=24), page_size=16)
    given = prompts([4, 23])
    results = engine.generate(given, [SamplingParams(max_tokens=m, seed=0, ignore_eos=True) for m in (20, 1)])
    assert [len(group[0].token_ids) for group in results] == [20, 1]
    assert_dense(engine, given, results)


def test_samples_share_the_pages_of_their_prompt(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine = build(make_model(), page_size=4, max_num_seqs=8)
    engine.add_request(prompts([10])[0], SamplingParams(n=8, max_tokens=8, seed=0, ignore_eos=True))
    engine.step()
    tables = [s.pages for s in engine.running]
    assert len(tables) == 8
    assert all(table[:2] == tables[0][:2] for table in tables)  # 8 of 10 prompt tokens lie in two full pages
    own = [page for table in tables for page in table[2:]]
    assert len(set(own)) == len(own) == 8 * 3  # 10 + 8 - 1 slots are five pages, three of them of its own
    assert [engine.pool.holders[page] for page in tables[0][:2]] == [8, 8]
    assert len(engine.pool.holders) - len(engine.pool.free) == 2 + 24
    while engine.running:
        engine.step()
    assert_all_free(engine)


def test_few_slots_many_prompts_equal_one_at_a_time(make_model: MakeModel, prompts: MakePrompts) -> None:
    model = make_model()
    given = prompts([(7 * i) % 19 + 1 for i in range(20)])
    params = [dataclasses.replace(p, max_tokens=(5 * i) % 23 + 1) for i, p in enumerate(seeded(20))]
    engine = build(model, max_num_seqs=4, page_size=4)
    together = engine.generate(given, params)
    assert [len(group[0].token_ids) for group in together] == [p.max_tokens for p in params]
    assert_dense(engine, given, together)
    alone = [engine.generate([prompt], p)[0] for prompt, p in zip(given, params)]
    assert tokens_of(alone) == tokens_of(together)


def tokens_of(results: Sequence[Sequence[Completion]]) -> list[tuple[int, ...]]:
    return [c.token_ids for group in results for c in group]


@pytest.mark.parametrize("changes", [{}, MANY_EXPERTS], ids=["few experts", "many experts"])
def test_a_seeded_draw_is_the_same_in_any_company(
    make_model: MakeModel, prompts: MakePrompts, changes: dict[str, object]
) -> None:
    engine = build(make_model(**changes))
    given, params = prompts([5 + i % 9 for i in range(64)]), seeded(64, max_tokens=64)
    together = engine.generate(given, params)
    for start in range(0, 64, 7):
        piece = slice(start, start + 7)
        assert tokens_of(engine.generate(given[piece], params[piece])) == tokens_of(together[piece])
    for i in range(0, 64, 8):
        assert tokens_of(engine.generate([given[i]], params[i])) == tokens_of([together[i]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"kv_lora_rank": 32, "q_lora_rank": None}, {"moe_intermediate_size": 12, "num_attention_heads": 3}],
    ids=["folded", "absorbed", "odd sizes"],
)  # fmt: skip
def test_exact_is_equal_to_the_last_bit_in_any_company(
    make_model: MakeModel, prompts: MakePrompts, dtype: torch.dtype, changes: dict[str, object]
) -> None:
    engine = build(make_model(dtype=dtype, **changes), exact=True, max_num_seqs=64)
    given, params = prompts([5 + i % 9 for i in range(64)]), seeded(64, max_tokens=24)
    params[3] = dataclasses.replace(params[3], top_p=0.9)  # sampling settings of others are no company either
    params[5] = dataclasses.replace(params[5], temperature=0.7)
    together = engine.generate(given, params)
    for size, starts in ((7, (0, 14)), (3, (4,)), (1, (0, 3, 5, 63))):
        for start in starts:
            piece = slice(start, start + size)
            assert engine.generate(given[piece], params[piece]) == together[piece], f"{size=} {start=}"
    # later arrival, other slots and pages
    small = build(engine.model, exact=True, max_num_seqs=5, page_size=16)
    assert small.generate(given[:9], params[:9]) == together[:9]


def test_samples_of_a_request_do_not_depend_on_how_many_there_are(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine = build(make_model())
    eight = engine.generate(prompts([6]), SamplingParams(n=8, max_tokens=10, seed=5))[0]
    three = engine.generate(prompts([6]), SamplingParams(n=3, max_tokens=10, seed=5))[0]
    assert tokens_of([three]) == tokens_of([eight])[:3]
    assert len(set(tokens_of([eight]))) == 8
    other = engine.generate(prompts([6]), SamplingParams(n=8, max_tokens=10, seed=6))[0]
    assert not set(tokens_of([other])) & set(tokens_of([eight]))


def test_without_a_seed_every_call_differs(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, params = build(make_model()), SamplingParams(max_tokens=20, ignore_eos=True)
    assert tokens_of(engine.generate(prompts([6]), params)) != tokens_of(engine.generate(prompts([6]), params))


def test_too_few_pages_for_all_at_once_make_requests_wait(make_model: MakeModel, prompts: MakePrompts) -> None:
    model = make_model()
    given, params = prompts([6] * 10), seeded(10, max_tokens=11)  # 16 slots each: 4 pages
    engine = build(model, page_size=4, num_pages=9)
    for prompt, p in zip(given, params):
        engine.add_request(prompt, p)
    finished, most = {}, 0
    while engine.waiting or engine.running:
        finished |= engine.step()
        most = max(most, len(engine.running))
    assert most == 2  # of 9 pages
    assert tokens_of([finished[i] for i in range(10)]) == tokens_of(build(model).generate(given, params))
    with pytest.raises(ValueError, match="prompt 1 needs 10 cache pages; num_pages is 9"):
        engine.generate([given[0], prompts([30])[0]], SamplingParams(max_tokens=8))
    assert_all_free(engine)


def test_greedy_decoding_takes_the_likeliest_token(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, prompt = build(make_model()), prompts([7])[0]
    params = SamplingParams(n=2, temperature=0, max_tokens=12, ignore_eos=True)
    first, second = engine.generate([prompt], params)[0]
    assert first == second
    tokens = torch.tensor([[*prompt, *first.token_ids]])
    with torch.no_grad():
        assert engine.model(tokens).logits[0].argmax(-1)[6:-1].tolist() == list(first.token_ids)
    torch.testing.assert_close(
        torch.tensor(first.logprobs), dense_logprobs(engine.model, prompt, first), atol=2e-5, rtol=0
    )
    assert first.log_support == first.logprobs


def test_logprobs_are_those_of_the_temperature(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, prompt = build(make_model()), prompts([5])[0]
    params = SamplingParams(temperature=0.6, top_p=0.8, max_tokens=16, seed=2, ignore_eos=True)
    completion = engine.generate([prompt], params)[0][0]
    tokens = torch.tensor([*prompt, *completion.token_ids])
    with torch.no_grad():
        logprobs = (engine.model(tokens[None]).logits[0] / 0.6).log_softmax(-1)[4:-1]  # [16, V]
    expected = logprobs.gather(1, tokens[5:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
    ordered = logprobs.exp().sort(-1, descending=True).values
    support = [row[: int((row.cumsum(0) < 0.8).sum()) + 1].sum().log().item() for row in ordered]
    assert completion.log_support == pytest.approx(support, abs=2e-5)
    assert all(lp - s < 1e-6 for lp, s in zip(completion.logprobs, completion.log_support))


def test_frequencies_of_samples_match_the_model(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, prompt = build(make_model(), max_num_seqs=4000), prompts([4])[0]
    samples = engine.generate([prompt], SamplingParams(n=4000, max_tokens=2, seed=11, ignore_eos=True))[0]
    with torch.no_grad():
        probs = engine.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    observed, expected = np.bincount([c.token_ids[0] for c in samples], minlength=40), probs * 4000
    large = expected >= 5
    statistic = ((observed - expected) ** 2 / expected)[large].sum()
    rest, rest_expected = observed[~large].sum(), expected[~large].sum()
    statistic += (rest - rest_expected) ** 2 / max(rest_expected, 1.0)
    assert statistic < 72.1  # chi-square, at most 39 degrees of freedom, p = 0.001


def test_finish_reasons(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, prompt = build(make_model()), prompts([6])[0]
    full = engine.generate([prompt], SamplingParams(max_tokens=200, seed=4, ignore_eos=True))[0][0]
    assert full.finish_reason == "length" and len(full.token_ids) == len(full.logprobs) == 200
    stop = full.token_ids.index(2)  # the end-of-sequence token
    assert 0 < stop < 199, "choose another seed"
    ended = engine.generate([prompt], SamplingParams(max_tokens=200, seed=4))[0][0]
    assert ended.finish_reason == "stop" and ended.token_ids == full.token_ids[: stop + 1]
    other = full.token_ids[1]
    params = SamplingParams(max_tokens=200, seed=4, stop_token_ids=(other,), ignore_eos=True)
    stopped = engine.generate([prompt], params)[0][0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == full.token_ids[: full.token_ids.index(other) + 1]
    on_the_last = engine.generate([prompt], SamplingParams(max_tokens=stop + 1, seed=4))[0][0]
    assert on_the_last.finish_reason == "stop" and on_the_last.token_ids == ended.token_ids
    own = build(engine.model, eos_token_ids=[other])
    assert own.generate([prompt], SamplingParams(max_tokens=200, seed=4))[0][0].token_ids == stopped.token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "has no tokens"),
        ([3, 40], SamplingParams(), "has the token id 40; ids are whole numbers from 0 to 39"),
        ([3, -1], SamplingParams(), "has the token id -1"),
        ([3, 1.5], SamplingParams(), r"has the token id 1\.5"),
        ([3] * 250, SamplingParams(max_tokens=7), r"has 250 tokens and max_tokens is 7: 257 are more"),
        ([3], SamplingParams(n=9), "asks for n=9 samples; max_num_seqs is 8"),
    ],
)
def test_a_malformed_request_says_so_and_others_go_on(
    make_model: MakeModel, prompts: MakePrompts, prompt: list[int], params: SamplingParams, message: str
) -> None:
    engine, good = build(make_model(), max_num_seqs=8), prompts([5])[0]
    fine = SamplingParams(n=2, max_tokens=6, seed=1)
    expected = engine.generate([good], fine)
    with pytest.raises(ValueError, match=f"prompt 1 {message}"):
        engine.generate([good, prompt], [fine, params])
    assert_all_free(engine)
    number = engine.add_request(good, fine)
    engine.step()
    with pytest.raises(ValueError, match=f"the prompt {message}"):
        engine.add_request(prompt, params)
    with pytest.raises(ValueError, match="unfinished"):
        engine.generate([good], fine)
    finished: dict[int, list[Completion]] = {}
    while engine.waiting or engine.running:
        finished |= engine.step()
    assert [finished[number]] == expected == engine.generate([good], fine)


def test_parameters_that_do_not_fit_the_prompts(make_model: MakeModel) -> None:
    engine = build(make_model())
    with pytest.raises(ValueError, match="2 sampling parameters for 1 prompts"):
        engine.generate([[3]], [SamplingParams()] * 2)
    with pytest.raises(ValueError, match=r"SamplingParams\.top_p is 0; it must be above 0 and at most 1"):
        SamplingParams(top_p=0)
    assert engine.generate([], SamplingParams()) == []


def test_an_interrupted_generation_leaves_a_usable_engine(
    make_model: MakeModel, prompts: MakePrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, given, params = build(make_model()), prompts([5, 6]), seeded(2, max_tokens=8)
    expected, decode, calls = engine.generate(given, params), engine.decoder.decode, []

    def interrupted(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*inputs)

    monkeypatch.setattr(engine.decoder, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(given, params)
    assert_all_free(engine)
    assert engine.generate(given, params) == expected


@pytest.mark.parametrize("changes", [{}, MANY_EXPERTS], ids=["few experts", "many experts"])
@pytest.mark.parametrize("exact", [False, True])
def test_routed_experts_are_the_dense_models(
    make_model: MakeModel, prompts: MakePrompts, changes: dict[str, object], exact: bool
) -> None:
    engine = build(make_model(**changes), page_size=4, exact=exact, enable_return_routed_experts=True)
    given = prompts([1, 6, 11])
    results = engine.generate(given, [SamplingParams(n=3, max_tokens=m, seed=2) for m in (12, 1, 7)])
    for prompt, group in zip(given, results):
        for c in group:
            tokens = torch.tensor([*prompt, *c.token_ids[:-1]])
            with torch.no_grad():
                out = engine.model.forward_packed(
                    tokens, SequenceLayout.from_batch(1, len(tokens)), output_routing=True
                )
            assert out.routed_experts is not None and c.routed_experts is not None
            assert c.routed_experts.dtype == np.uint8
            assert c.routed_experts.shape == (len(prompt) + len(c.token_ids) - 1, 2, 2)
            np.testing.assert_array_equal(np.sort(c.routed_experts), np.sort(out.routed_experts.numpy()))
    assert build(engine.model).generate(given[:1], SamplingParams(seed=0))[0][0].routed_experts is None


def test_new_weights_change_version_and_samples(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, other = build(make_model(seed=1)), make_model(seed=2)
    given, params = prompts([5, 8]), SamplingParams(n=2, max_tokens=10, seed=3, ignore_eos=True)
    before = engine.generate(given, params)
    engine.load_weights(hf_state(other), 7)
    after = engine.generate(given, params)
    assert [c.policy_version for group in before + after for c in group] == [0] * 4 + [7] * 4
    assert tokens_of(after) == tokens_of(build(other).generate(given, params)) != tokens_of(before)
    assert_dense(engine, given, after)  # every derived matrix followed


def test_a_partial_set_of_weights_is_refused(make_model: MakeModel, prompts: MakePrompts) -> None:
    engine, weights = build(make_model(seed=1)), list(hf_state(make_model(seed=2)))
    with pytest.raises(ValueError, match="missing from the weights"):
        engine.load_weights(weights[:-1], 1)
    assert engine.policy_version == 0
    with pytest.raises(ValueError, match="incomplete; load a complete one first"):  # never a mixture of two versions
        engine.generate(prompts([5]), SamplingParams())
    name, tensor = weights[0]
    with pytest.raises(ValueError, match="has shape"):
        engine.load_weights([(name, tensor[:-1]), *weights[1:]], 1)
    engine.load_weights(weights, 1)
    assert engine.generate(prompts([5]), SamplingParams())[0][0].policy_version == 1


@pytest.mark.parametrize("changes", [{}, MANY_EXPERTS, {"kv_lora_rank": 32}], ids=str)
def test_bfloat16(make_model: MakeModel, prompts: MakePrompts, changes: dict[str, object]) -> None:
    engine = build(make_model(dtype=torch.bfloat16, **changes), page_size=4)
    given = prompts([3, 8, 13])
    results = engine.generate(given, SamplingParams(n=4, max_tokens=10, seed=1, ignore_eos=True))
    differences = [
        (torch.tensor(c.logprobs) - dense_logprobs(engine.model, prompt, c)).abs()
        for prompt, group in zip(given, results)
        for c in group
    ]
    # rounding differs with the order of operations, and may send a token to another expert
    assert torch.cat(differences).median() < 0.05 and torch.cat(differences).mean() < 0.2


def test_engines_and_directories(make_model: MakeModel, tmp_path: object) -> None:
    model = make_model()
    model.save_pretrained(str(tmp_path))
    params = SamplingParams(max_tokens=8, seed=1)
    engine = build_engine(str(tmp_path))
    assert engine.generate([[5, 6]], params) == build(model).generate([[5, 6]], params)
    half = build_engine(str(tmp_path), dtype=torch.bfloat16)
    assert isinstance(half, EmbeddedEngine) and half.decoder.layers[0].down.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'sglang'; the engines are"):
        build_engine(model, engine="sglang")
