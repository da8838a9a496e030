"""Real vLLM against the embedded engine and the learner: the same numbers, before and after pushes of weights; and
every fault that is planted in a push is caught and named. One engine serves most tests, as start-up takes seconds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from grpo.config import GRPOConfig
from grpo.learner import Learner
from grpo.weight_sync import Bucket
from model import DeepseekV3ForCausalLM
from model.names import hf_state
from rollout import SamplingParams, WeightFault, build_engine
from tests.weights import posted, unpacked

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` has vLLM"),
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 32, "kv_cache_gb": 0.03}
PROMPTS = [np.random.default_rng(i).integers(3, 96, 2 + 3 * i % 23).tolist() for i in range(24)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(vllm_tiny: Any) -> Path:
    return vllm_tiny()


@pytest.fixture(scope="module")
def engine(directory: Path) -> Any:
    importlib.import_module("torch._dynamo")  # as a learner's optimiser does
    return build_engine(directory, "vllm", enable_return_routed_experts=True, **OPTIONS)


@pytest.fixture(scope="module")
def policy(directory: Path) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(directory)


def shake(model: DeepseekV3ForCausalLM, seed: int, size: float = 0.05) -> None:
    """Every tensor changes, the router's biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            amount = 0.1 if name.endswith("e_score_correction_bias") else size
            tensor += amount * torch.randn(tensor.shape, generator=generator)


def pairs(model: DeepseekV3ForCausalLM) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in hf_state(model)]


def drawn(engine: Any, params: SamplingParams = GREEDY) -> list[Any]:
    return [completion for group in engine.generate(PROMPTS, params) for completion in group]


@pytest.fixture
def pushed(engine: Any, policy: DeepseekV3ForCausalLM) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The weights that the engine holds; afterwards it holds them again, whatever a test did."""
    weights = pairs(policy)
    engine.load_weights(weights, 1)
    yield weights
    engine.load_weights(pairs(policy), 1)


def test_greedy_tokens_logprobs_and_routes_are_the_embedded_engines(engine: Any, directory: Path) -> None:
    ours = drawn(build_engine(directory, enable_return_routed_experts=True))
    theirs = drawn(engine)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    assert max(np.abs(np.subtract(a.logprobs, b.logprobs)).max() for a, b in zip(ours, theirs)) < 1e-4
    chosen = [(np.sort(a.routed_experts, -1), np.sort(b.routed_experts, -1)) for a, b in zip(ours, theirs)]
    assert sum(a.shape[0] * a.shape[1] for a, _ in chosen) > 500
    assert sum(int((a != b).any(-1).sum()) for a, b in chosen) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU alone")
def test_on_a_cpu_nothing_is_compiled(engine: Any) -> None:
    """Whoever came first: vLLM's sampler would compile C++ for 20 seconds on first use."""
    assert importlib.import_module("torch._dynamo").config.disable


@pytest.mark.parametrize(
    "truncation", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"top_p": 0.9, "top_k": 9, "min_p": 0.01}]
)
def test_logprobs_and_support_by_the_definition(
    engine: Any, policy: DeepseekV3ForCausalLM, pushed: Any, truncation: dict[str, Any]
) -> None:
    """logprobs: untruncated at the temperature; log_support: the mass that truncation kept, worked out from logits."""
    params = SamplingParams(n=2, temperature=0.7, max_tokens=8, seed=5, ignore_eos=True, **truncation)
    for prompt, group in zip(PROMPTS[:6], engine.generate(PROMPTS[:6], params)):
        assert group[0].token_ids != group[1].token_ids
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logits = policy(ids).logits[0, len(prompt) - 1 : -1] / 0.7
            logprobs = logits.double().log_softmax(-1)
            tokens = torch.tensor(completion.token_ids)
            want = logprobs.gather(1, tokens[:, None])[:, 0]
            np.testing.assert_allclose(completion.logprobs, want, atol=1e-4)
            support = [log_support(row.exp(), **truncation) for row in logprobs]
            np.testing.assert_allclose(completion.log_support, support, atol=1e-4)


def log_support(p: torch.Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> float:
    """min-p, then top-k, then top-p of what is left, one token at a time."""
    kept = [i for i in range(len(p)) if p[i] >= min_p * p.max()]
    kept.sort(key=lambda i: -float(p[i]))
    kept = kept[: top_k or None]
    total, mass, some = float(p[kept].sum()), 0.0, []
    for i in kept:
        if mass >= top_p * total:
            break
        some.append(i)
        mass += float(p[i])
    return float(np.log(float(p[some].sum())))


def test_a_seeded_draw_is_the_same_alone_and_in_a_batch(engine: Any, pushed: Any) -> None:
    params = SamplingParams(n=2, max_tokens=8, seed=3)
    together = engine.generate(PROMPTS, params)
    alone = engine.generate(PROMPTS[5:6], params)[0]
    assert [c.token_ids for c in alone] == [c.token_ids for c in together[5]]
    other = engine.generate(PROMPTS[5:6], dataclasses.replace(params, seed=4))[0]
    assert [c.token_ids for c in other] != [c.token_ids for c in alone]


def test_end_tokens_stop_and_count(engine: Any, pushed: Any) -> None:
    [[first]] = engine.generate(PROMPTS[:1], GREEDY)
    stop = dataclasses.replace(GREEDY, stop_token_ids=(first.token_ids[3],))
    [[cut]] = engine.generate(PROMPTS[:1], stop)
    length = first.token_ids.index(first.token_ids[3]) + 1
    assert (cut.token_ids, cut.finish_reason, first.finish_reason) == (first.token_ids[:length], "stop", "length")


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [([], 4, "prompt 1 is empty"), ([96], 4, "outside 0 .. 95"), ([5] * 120, 20, "more than the context of 128")],
)
def test_bad_prompts_are_named(engine: Any, prompt: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate([[5], prompt], SamplingParams(max_tokens=max_tokens))


def test_after_every_push_the_engine_is_a_fresh_one(engine: Any, policy: Any, tmp_path: Path) -> None:
    """Those of transformers to 1e-4 after each push; after some, a fresh engine's tokens and log-probabilities exactly.

    Fresh engines are kept: dropping one tears down the others. They take most of the time.
    """
    model = policy
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for push in range(1, 21):
        shake(model, push)
        weights = pairs(model)
        engine.load_weights(weights, push)
        engine.check_weights(weights)
        model.save_pretrained(tmp_path / str(push))
        got = drawn(engine)
        assert {c.policy_version for c in got} == {push}
        if push in (1, 2, 10, 20):
            fresh = build_engine(tmp_path / str(push), "vllm", **OPTIONS)
            assert [(c.token_ids, c.logprobs) for c in got] == [(c.token_ids, c.logprobs) for c in drawn(fresh)], push
        greedy_by_transformers(tmp_path / str(push), got)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(before[name])


def greedy_by_transformers(directory: Path, completions: list[Any]) -> None:
    """Each token is the likeliest after those before it, and its log-probability is the same to 1e-4."""
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = [torch.tensor([*prompt, *c.token_ids]) for prompt, c in zip(PROMPTS, completions, strict=True)]
    with torch.no_grad():  # what pads a row on the right comes after all that counts
        logprobs = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.log_softmax(-1)
    for row, (prompt, completion) in zip(logprobs, zip(PROMPTS, completions)):
        own = row[len(prompt) - 1 : len(prompt) - 1 + len(completion.token_ids)]
        np.testing.assert_allclose(
            completion.logprobs, own.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0], atol=1e-4
        )
        np.testing.assert_allclose(completion.logprobs, own.amax(1), atol=1e-4)


def swapped(name: str) -> Any:
    """Two rows of one tensor change places, after whoever checks the sender has looked."""
    return lambda weights: [(n, t[[1, 0, *range(2, len(t))]] if n == name else t) for n, t in weights]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (swapped("model.layers.2.mlp.experts.5.gate_proj.weight"), r"model\.layers\.2\.mlp\.experts\.5"),
        (swapped("model.layers.1.mlp.experts.0.down_proj.weight"), r"model\.layers\.1\.mlp\.experts\.0"),
        (swapped("model.layers.0.self_attn.kv_b_proj.weight"), r"model\.layers\.0\.self_attn\.kv_b_proj"),
        (swapped("lm_head.weight"), r"lm_head\.weight"),
        (
            lambda weights: [
                pair for pair in weights if not pair[0].endswith("layers.1.mlp.gate.e_score_correction_bias")
            ],
            r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
        ),
        (
            lambda weights: [
                (n, t.bfloat16().float() if n.endswith("e_score_correction_bias") else t) for n, t in weights
            ],
            "e_score_correction_bias differs",
        ),
    ],
)
def test_a_tensor_that_went_wrong_in_the_engine_is_named(
    engine: Any, policy: Any, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str
) -> None:
    shake(policy, 99)  # what is not taken over differs from what was pushed
    weights, rpc = pairs(policy), engine.rpc
    monkeypatch.setattr(
        engine, "rpc", lambda method, *args: rpc(method, *(map(fault, args) if method == "load" else args))
    )
    engine.load_weights(weights, 2)
    with pytest.raises(WeightFault, match=message):
        engine.check_weights(weights)
    with pytest.raises(ValueError, match="load a whole version"):
        engine.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    engine.load_weights(weights, 3)
    engine.check_weights(weights)


def test_a_stale_kernel_layout_is_found(engine: Any, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM does by itself on a CPU: the experts' new weights are not packed for the kernel."""
    shake(policy, 98)
    weights, rpc = pairs(policy), engine.rpc

    def plain(method: str, *args: Any) -> Any:
        if method != "load":
            return rpc(method, *args)
        return engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(args[0])})

    monkeypatch.setattr(engine, "rpc", plain)
    engine.load_weights(weights, 2)
    with pytest.raises(WeightFault, match=r"model\.layers\.1\.mlp\.experts\.0"):
        engine.check_weights(weights)
    monkeypatch.undo()
    engine.load_weights(weights, 3)
    engine.check_weights(weights)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda w: [p for p in w if "layers.0.self_attn.kv_a_proj" not in p[0]],
            "kv_a_proj_with_mqa.weight is missing",
        ),
        (lambda w: [p for p in w if not p[0].endswith("score_correction_bias")], "correction_bias is missing"),
        (lambda w: [(n, t.bfloat16() if "correction" in n else t) for n, t in w], "the router's bias must be float32"),
        (lambda w: [*w, w[7]], "was given twice"),
        (lambda w: [(n, t[:-1] if n == "lm_head.weight" else t) for n, t in w], r"lm_head.weight has the shape \(95"),
        (lambda w: [*w, ("model.layers.9.x", w[0][1])], r"model.layers.9.x is no tensor of the model"),
    ],
)
def test_an_incomplete_push_loads_nothing(engine: Any, pushed: Any, fault: Any, message: str) -> None:
    before = drawn(engine)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(fault(pushed), 2)
    assert drawn(engine) == before


def test_faults_of_the_way_are_found_before_a_tensor_is_loaded(policy: Any) -> None:
    made = posted(hf_state(policy), 4, max_bytes=20_000)
    assert len(made) > 3
    older = posted(hf_state(policy), 3, max_bytes=20_000)
    damaged = made[1].payload.copy()
    damaged[100:104] = 255 - damaged[100:104]
    faults: list[tuple[list[Bucket], str]] = [
        (made[:-1], "not one whole version"),
        ([*made, made[2]], "not one whole version"),
        ([older[0], *made[1:]], r"versions \[3, 4\]"),
        ([made[0], dataclasses.replace(made[1], payload=damaged), *made[2:]], r"model\..* of version 4 was damaged"),
    ]
    for received, message in faults:
        with pytest.raises(ValueError, match=message):
            unpacked(received)


def test_canaries_hold_the_engine_against_the_learner(engine: Any, directory: Path) -> None:
    learner = Learner(directory, GRPOConfig(), canaries=True)
    first, *_ = made = learner.weights()
    weights = unpacked(made)
    engine.load_weights(weights, 0)
    assert first.canary is not None
    with torch.no_grad():
        logits = DeepseekV3ForCausalLM.from_pretrained(directory)(torch.tensor(first.canary.prompts)).logits
    want = logits.log_softmax(-1)[:, :-1].gather(2, torch.tensor(first.canary.prompts)[:, 1:, None])[..., 0]
    np.testing.assert_allclose(first.canary.logprobs, want, atol=1e-5)
    engine.check_canary(first.canary.prompts, first.canary.logprobs)
    other = DeepseekV3ForCausalLM.from_pretrained(directory)
    shake(other, 7, 0.001)
    engine.load_weights(pairs(other), 1)
    with pytest.raises(WeightFault, match="differ from the learner's by"):
        engine.check_canary(first.canary.prompts, first.canary.logprobs)


def test_rope_that_vllm_computes_wrong_in_eager_mode_is_found(directory: Path) -> None:
    from vllm.model_executor.layers import rotary_embedding  # pyright: ignore[reportMissingImports]

    rotary_embedding._ROPE_DICT.clear()  # it keeps layers of earlier engines, built with the right settings
    canary = Learner(directory, GRPOConfig(), canaries=True).canary()
    wrong = build_engine(directory, "vllm", compilation_config={"custom_ops": ["all"]}, **OPTIONS)
    with pytest.raises(WeightFault, match="canary prompts under version 0"):
        wrong.check_canary(canary.prompts, canary.logprobs)  # type: ignore[attr-defined]
    rotary_embedding._ROPE_DICT.clear()  # nor may later engines get this one's
