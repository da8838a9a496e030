"""Packed rows against one padded batch and against samples by themselves: same losses, same gradients."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.logprobs import token_logprobs
from grpo.packing import pack
from grpo.records import PackedBatch, TrainingSample
from model import DeepseekV3ForCausalLM, SequenceLayout
from model.create import create_model

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny_v3.yaml"
# (prompt length, completion lengths) of each group; the last but one has a prompt of one token
SHAPES = [(9, (5, 1, 12)), (4, (7,)), (1, (3, 6)), (6, (2, 2, 2, 8))]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeepseekV3ForCausalLM:
    """With router biases and norms that are not the initial ones, so that they matter."""
    torch.set_num_threads(1)
    model = create_model(TINY, tmp_path_factory.mktemp("tiny"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.1, 0.1, generator=generator)
    return model


def make_groups(shapes: list[tuple[int, tuple[int, ...]]] = SHAPES) -> list[list[TrainingSample]]:
    rng = np.random.default_rng(0)
    groups = []
    for prompt_length, lengths in shapes:
        prompt = tuple(rng.integers(0, 50, prompt_length).tolist())
        groups.append(
            [
                TrainingSample(
                    prompt_ids=prompt,
                    completion_ids=tuple(rng.integers(0, 50, n).tolist()),
                    weight=float(rng.uniform(0.1, 1)),
                    advantage=float(rng.normal()),
                    rollout_logprobs=tuple(rng.uniform(-3, 0, n).tolist()),
                    log_support=tuple(rng.uniform(-1, 0, n).tolist()),
                    routed_experts=rng.integers(0, 8, (prompt_length + n - 1, 2, 2)).astype(np.uint8),
                )
                for n in lengths
            ]
        )
    return groups


def gradients(model: DeepseekV3ForCausalLM, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model: DeepseekV3ForCausalLM, batches: list[PackedBatch]) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Log-probabilities of all rows, sum of weight * advantage * logprob, its gradient; no routing is replayed."""
    rows, losses = [], []
    for batch in batches:
        layout = SequenceLayout.from_segments(batch.cu_seqlens, batch.parent, batch.position_ids)
        hidden = model.forward_packed(batch.input_ids, layout).hidden
        logprobs, _ = token_logprobs(hidden[batch.source], model.lm_head.weight, batch.target, 0.7)
        rows.append(logprobs)
        losses.append((logprobs * batch.weights * batch.advantages).sum())
    loss = torch.stack(losses).sum()
    return torch.cat(rows).detach(), loss.detach(), gradients(model, loss)


def padded(model: DeepseekV3ForCausalLM, samples: list[TrainingSample]) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """The same by the plain model on rows padded to one length [B, T]."""
    whole = [s.prompt_ids + s.completion_ids for s in samples]
    ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.int64)
    for row, tokens in zip(ids, whole):
        row[: len(tokens)] = torch.tensor(tokens)
    table = torch.log_softmax(model(ids).logits / 0.7, dim=-1)
    rows, loss = [], torch.zeros(())
    for i, s in enumerate(samples):
        where = torch.arange(len(s.prompt_ids), len(whole[i]))
        rows.append(table[i, where - 1, ids[i, where]])
        loss = loss + s.weight * s.advantage * rows[-1].sum()
    return torch.cat(rows).detach(), loss.detach(), gradients(model, loss)


def assert_same(
    got: tuple[torch.Tensor, torch.Tensor, Gradients], want: tuple[torch.Tensor, torch.Tensor, Gradients]
) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)
    assert got[2].keys() == want[2].keys()
    scale = max(g.abs().max() for g in want[2].values())
    for name, grad in want[2].items():
        assert (got[2][name] - grad).abs().max() < 2e-6 * scale, name
    assert got[2]["model.layers.0.self_attn.kv_b_proj.weight"].abs().max() > 0


def test_packed_equals_padded(model: DeepseekV3ForCausalLM) -> None:
    groups = make_groups()
    want = padded(model, [s for group in groups for s in group])
    shared = pack(groups, 1000)
    assert len(shared) == 1
    assert int((shared[0].parent >= 0).sum()) == 7
    assert_same(packed(model, shared), want)
    alone = pack([[s] for group in groups for s in group], 1000)
    assert int((alone[0].parent >= 0).sum()) == 0
    assert len(alone[0].input_ids) > len(shared[0].input_ids)
    assert_same(packed(model, alone), want)
    several = pack(groups, 22)
    assert len(several) == 4
    assert_same(packed(model, several), want)


def test_layout_of_a_pack() -> None:
    prompt = (10, 11, 12)
    group = [
        TrainingSample(prompt, (20, 21), 0.5, 1.5, (-1.0, -2.0), (-0.1, -0.2)),
        TrainingSample(prompt, (30,), 0.25),
    ]
    (batch,) = pack([group, [TrainingSample((40, 41), (50, 51), 1.0, -1.0)]], 100)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 12, 40, 41, 50]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    assert batch.parent.tolist() == [-1, 0, 0, -1]
    assert batch.source.tolist() == [2, 3, 4, 6, 7]
    assert batch.target.tolist() == [20, 21, 30, 50, 51]
    assert batch.sample.tolist() == [0, 0, 1, 2, 2]
    assert batch.num_samples == 3
    assert batch.advantages.tolist() == [1.5, 1.5, 1.0, -1.0, -1.0]
    assert batch.weights.tolist() == [0.5, 0.5, 0.25, 1.0, 1.0]
    assert batch.rollout_logprobs.tolist() == [-1.0, -2.0, 0.0, 0.0, 0.0]
    assert batch.log_support.tolist() == pytest.approx([-0.1, -0.2, 0.0, 0.0, 0.0])
    assert batch.routed_experts is None


def test_one_token_prompt_is_not_shared() -> None:
    (batch,) = pack([[TrainingSample((7,), (1, 2), 1.0), TrainingSample((7,), (3,), 1.0)]], 100)
    assert batch.input_ids.tolist() == [7, 1, 7]
    assert batch.position_ids.tolist() == [0, 1, 0]
    assert batch.parent.tolist() == [-1, -1]
    assert batch.source.tolist() == [0, 1, 2]


def test_recorded_routing_follows_its_tokens() -> None:
    groups = make_groups()
    (batch,) = pack(groups, 1000)
    assert batch.routed_experts is not None
    assert batch.routed_experts.dtype == torch.int64
    assert len(batch.routed_experts) == len(batch.input_ids)
    row = 0  # the prompt comes from the group's first sample, the rest from each one's own
    for group in groups:
        length = len(group[0].prompt_ids)
        shared = length - 1 if len(group) > 1 else 0
        assert group[0].routed_experts is not None
        assert batch.routed_experts[row : row + shared].tolist() == group[0].routed_experts[:shared].tolist()
        row += shared
        for sample in group:
            assert sample.routed_experts is not None
            own = sample.routed_experts[shared:]
            assert batch.routed_experts[row : row + len(own)].tolist() == own.tolist()
            row += len(own)
    assert row == len(batch.input_ids)


def test_max_tokens_and_order() -> None:
    groups = make_groups([(5, (4, 6, 3)), (3, (2,)), (8, (30, 1)), (2, (9, 9, 9, 9)), (4, (1, 1))])
    for limit in range(1, 60):
        batches = pack(groups, limit)
        targets = [t for batch in batches for t in batch.target.tolist()]
        assert targets == [t for group in groups for s in group for t in s.completion_ids]
        for batch in batches:
            assert len(batch.input_ids) <= limit or batch.num_samples == 1, limit
            assert int(batch.cu_seqlens[-1]) == len(batch.input_ids)
        for batch, after in pairwise(batches):  # not cut earlier than it had to be
            assert len(batch.input_ids) + len(after.input_ids) > limit


def test_groups_are_whole_where_they_fit_and_split_where_they_do_not() -> None:
    # packed tokens: 4 + 4 + 6 + 3 = 17, 2 + 2 = 4, 1 + 36 = 37
    groups = make_groups([(5, (4, 6, 3)), (3, (2,)), (2, (9, 9, 9, 9))])
    sizes = {limit: [(b.num_samples, len(b.input_ids)) for b in pack(groups, limit)] for limit in (9, 17, 20, 21, 58)}
    assert sizes[58] == [(8, 58)]
    assert sizes[21] == [(4, 21), (2, 19), (2, 19)]
    assert sizes[20] == [(3, 17), (1, 4), (2, 19), (2, 19)]
    # a sample of the last group has 10 with its prompt, so one joins the second group and two (19) are too many
    assert sizes[17] == [(3, 17), (2, 14), (1, 10), (1, 10), (1, 10)]
    assert sizes[9] == [(1, 8), (1, 10), (1, 7), (1, 4), (1, 10), (1, 10), (1, 10), (1, 10)]


def test_errors() -> None:
    good = TrainingSample((1, 2), (3,), 1.0)
    for bad in (TrainingSample((), (3,), 1.0), TrainingSample((1,), (), 1.0)):
        with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
            pack([[good], [bad]], 10)
    assert pack([], 10) == []
    assert len(pack([[], [good]], 10)) == 1
