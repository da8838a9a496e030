"""Balancing: the bias that evens out the experts' load, what keeps it FP32, and the sequence-wise balance loss."""

from collections.abc import Callable

import pytest
import torch

from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.moe import TopkRouter, balanced_bias, expert_counts, sequence_balance_loss

MakeModel = Callable[..., DeepseekV3ForCausalLM]
MakeConfig = Callable[..., DeepseekV3Config]


def test_router_bias_stays_float32(make_model: MakeModel) -> None:
    model = make_model()
    before = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model.to(torch.bfloat16)
    after = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert model.dtype == torch.bfloat16 and torch.equal(before, after)


def test_bias_update() -> None:
    moved = balanced_bias(torch.zeros(4), torch.tensor([9, 1, 5, 5]), rate=0.001)
    torch.testing.assert_close(moved, torch.tensor([-0.001, 0.001, 0.0, 0.0]))


def max_violation(counts: torch.Tensor) -> float:
    return (counts.max() / counts.float().mean() - 1).item()


@pytest.mark.parametrize("groups", [{"n_group": 1, "topk_group": 1}, {"n_group": 4, "topk_group": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_balances_a_skewed_stream(make_config: MakeConfig, groups: dict[str, int], dtype: torch.dtype) -> None:
    """With gamma 0.001, from a stream that prefers some experts to one that loads all of them alike."""
    router = TopkRouter(make_config(**groups))
    torch.nn.init.eye_(router.weight)
    router = router.to(dtype)
    preference = torch.linspace(-1.5, 1.5, 8)[torch.randperm(8)]  # of an expert's logit

    def counts(tokens: int) -> torch.Tensor:
        x = torch.randn(tokens, 32) * 0.7
        x[:, :8] += preference
        return router(x.to(dtype)).counts

    before = max_violation(counts(20000))
    for _ in range(600):
        bias = router.e_score_correction_bias
        bias.copy_(balanced_bias(bias, counts(500), 0.001))
    after = max_violation(counts(20000))
    assert before > 0.5 and after < 0.1, f"{before=} {after=}"
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.e_score_correction_bias.abs().max() > 0.25  # a bfloat16 bias would be off the grid of its steps here


def test_expert_counts_of_masked_tokens() -> None:
    experts = torch.tensor([[[0, 1], [3, 2]], [[0, 2], [3, 0]], [[1, 2], [1, 2]]])  # [T 3, L 2, K 2]
    assert expert_counts(experts, 4).tolist() == [[2, 2, 2, 0], [1, 1, 2, 2]]
    assert expert_counts(experts, 4, torch.tensor([True, True, False])).tolist() == [[2, 1, 1, 0], [1, 0, 1, 2]]


def test_balance_loss_against_its_extremes_and_its_equations() -> None:
    ids = torch.tensor([0] * 4 + [1] * 4)
    even = torch.eye(4).repeat(2, 1)  # each expert chosen once per sequence of 4
    assert sequence_balance_loss(even, ids, 2, top_k=1).item() == pytest.approx(1.0)
    pairs = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]).repeat(4, 1)  # two of four, each in every second token
    assert sequence_balance_loss(pairs, ids, 2, top_k=2).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert sequence_balance_loss(collapsed, ids, 2, top_k=1).item() == pytest.approx(4.0)
    # balanced over the batch, collapsed within each sequence: the loss is of sequences
    apart = torch.eye(4)[ids]
    assert sequence_balance_loss(apart, ids, 2, top_k=1).item() == pytest.approx(4.0)
    # Against the equations, sequence by sequence; the counts f are constants of the gradient.
    scores = torch.rand(8, 4, requires_grad=True)
    expected = torch.zeros(())
    for sequence in scores.split(4):
        f = 4 / (2 * 4) * sequence.topk(2).indices.flatten().bincount(minlength=4)
        expected = expected + (f * (sequence / sequence.sum(-1, keepdim=True)).mean(0)).sum() / 2
    loss = sequence_balance_loss(scores, ids, 2, top_k=2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (loss, expected)))
