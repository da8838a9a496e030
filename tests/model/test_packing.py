"""Packed, bucketed, shared-prompt and checkpointed passes against plain separate sequences."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from model import DeepseekV3ForCausalLM, SequenceLayout
from model.layout import MAX_BUCKETS

MakeModel = Callable[..., DeepseekV3ForCausalLM]
# Two prompts (segments 0 and 4) with samples, and a lone sequence.
LENGTHS = [7, 5, 30, 1, 9, 14, 2, 40]
PARENT = [-1, 0, 0, 0, -1, 4, 4, -1]
CU = np.concatenate(([0], np.cumsum(LENGTHS)))


def written_out(ids: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """(whole sequence, prompt length) of each sample."""
    pieces = ids.split(LENGTHS)
    leaves = [s for s in range(len(LENGTHS)) if s not in PARENT]
    return [
        (pieces[s], 0) if PARENT[s] < 0 else (torch.cat((pieces[PARENT[s]], pieces[s])), LENGTHS[PARENT[s]])
        for s in leaves
    ]


def test_packed_equals_separate(make_model: MakeModel) -> None:
    model, ids = make_model(), torch.randint(0, 40, (int(CU[-1]),))
    packed = model.forward_packed(ids, SequenceLayout.from_segments(CU)).hidden
    separate = torch.cat([model(piece[None]).hidden[0] for piece in ids.split(LENGTHS)])
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


def test_shared_prompt_equals_repeated_prompt(make_model: MakeModel) -> None:
    model, ids = make_model(), torch.randint(0, 40, (int(CU[-1]),))
    layout = SequenceLayout.from_segments(CU, PARENT)
    hidden = model.forward_packed(ids, layout).hidden
    leaves = [s for s in range(len(LENGTHS)) if s not in PARENT]
    probes = [torch.randn(LENGTHS[s], 32) for s in leaves]
    prompt_probes = {s: torch.randn(LENGTHS[s], 32) for s in (0, 4)}
    loss = sum((hidden[CU[s] : CU[s + 1]] * p).sum() for s, p in zip(leaves, probes))
    loss = loss + sum((hidden[CU[s] : CU[s + 1]] * p).sum() for s, p in prompt_probes.items())
    loss.backward()
    shared = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    model.zero_grad()

    loss = torch.zeros(())
    for (sequence, prompt), s, probe in zip(written_out(ids), leaves, probes):
        plain = model(sequence[None]).hidden[0]
        torch.testing.assert_close(hidden[CU[s] : CU[s + 1]], plain[prompt:], rtol=1e-4, atol=1e-5)
        loss = loss + (plain[prompt:] * probe).sum()
        if PARENT[s] in prompt_probes:  # the prompt's own loss counts once
            parent = PARENT[s]
            torch.testing.assert_close(hidden[CU[parent] : CU[parent + 1]], plain[:prompt], rtol=1e-4, atol=1e-5)
            loss = loss + (plain[:prompt] * prompt_probes.pop(parent)).sum()
    loss.backward()
    for name, p in model.model.named_parameters():
        assert (shared[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_every_token_is_produced_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        segments = int(rng.integers(1, 60))
        parent = np.where(np.arange(segments) % 5 == 0, -1, np.arange(segments) // 5 * 5)
        cu = np.concatenate(([0], np.cumsum(rng.integers(1, 50, segments))))
        layout = SequenceLayout.from_segments(cu, parent)
        tokens = torch.arange(int(cu[-1]))
        assert torch.equal(layout.scatter(layout.gather(tokens)), tokens)
        assert len(layout.buckets) <= MAX_BUCKETS
        assert int(layout.position_ids.max()) == int(
            max(cu[s + 1] - cu[s] + (cu[p + 1] - cu[p] if p >= 0 else 0) for s, p in enumerate(parent)) - 1
        )


def test_equal_lengths_need_no_gather() -> None:
    layout = SequenceLayout.from_batch(3, 5)
    x = torch.randn(15, 2)
    assert layout.identity and layout.gather(x)[0].data_ptr() == x.data_ptr()
    assert torch.equal(layout.position_ids, torch.arange(5).repeat(3))


def test_buckets_save_padding() -> None:
    lengths = [10] * 20 + [200] * 3
    layout = SequenceLayout.from_segments(np.concatenate(([0], np.cumsum(lengths))))
    assert [b.shape for b in layout.buckets] == [(20, 10), (3, 200)]


def test_few_shapes(make_model: MakeModel) -> None:
    """Rows of rounded lengths hold the same sequences: the same hidden states, and a padding of at most an eighth."""
    model, ids = make_model(), torch.randint(0, 40, (int(CU[-1]),))
    plain, few = (SequenceLayout.from_segments(CU, PARENT, few_shapes=f) for f in (False, True))
    assert [b.shape[1] for b in few.buckets] == [64] * len(plain.buckets)
    got, want = (model.forward_packed(ids, layout).hidden for layout in (few, plain))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # attention adds up in another order at another length
    shapes = set()
    for length in range(100, 4096, 7):
        (bucket,) = SequenceLayout.from_segments([0, length], few_shapes=True).buckets
        assert length <= bucket.shape[1] < max(length * 9 / 8, length + 64)
        shapes.add(bucket.shape)
    assert len(shapes) <= 31


@pytest.mark.parametrize(
    ("cu", "parent"), [([0, 3, 3], None), ([1, 3], None), ([0, 2, 4, 6], [-1, 0, 1]), ([0, 2], [1])]
)
def test_broken_structure_is_an_assertion(cu: list[int], parent: list[int] | None) -> None:
    with pytest.raises(AssertionError):
        SequenceLayout.from_segments(cu, parent)


def test_gradient_checkpointing_gives_equal_gradients(make_model: MakeModel) -> None:
    model, ids = make_model(), torch.randint(0, 40, (int(CU[-1]),))
    layout, grads = SequenceLayout.from_segments(CU, PARENT), []
    for flag in (False, True):
        model.model.gradient_checkpointing = flag
        model.zero_grad()
        model.forward_packed(ids, layout).hidden.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_replayed_routing(make_model: MakeModel) -> None:
    model, ids = make_model(), torch.randint(0, 40, (20,))
    layout = SequenceLayout.from_batch(1, 20)
    free = model.forward_packed(ids, layout, output_routing=True, output_router_scores=True)
    assert free.routed_experts.shape == (20, 2, 2)
    assert free.expert_counts.sum(1).tolist() == [40, 40]
    for layer in range(2):
        counted = free.routed_experts[:, layer].flatten().bincount(minlength=8)
        assert torch.equal(counted, free.expert_counts[layer])
    replayed = model.forward_packed(ids, layout, routed_experts=free.routed_experts)
    assert torch.equal(replayed.hidden, free.hidden)
    # Not recorded (-1): routed normally. Another choice: other numbers, and the given experts are the ones used.
    unrecorded = model.forward_packed(ids, layout, routed_experts=torch.full_like(free.routed_experts, -1))
    assert torch.equal(unrecorded.hidden, free.hidden)
    other = (free.routed_experts + 1) % 8
    forced = model.forward_packed(ids, layout, routed_experts=other, output_routing=True)
    assert torch.equal(forced.routed_experts, other) and (forced.hidden - free.hidden).abs().max() > 0.01
    with pytest.raises(ValueError, match="replay needs"):
        model.forward_packed(ids, layout, routed_experts=other[:, :1])
