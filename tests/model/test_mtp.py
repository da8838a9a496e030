"""Multi-token prediction: packed and shared against sequence by sequence, chunks, gradients, targets."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import model.mtp as mtp_module
from model import DeepseekV3ForCausalLM, SequenceLayout
from model.mtp import MTPLoss, mtp_loss

MakeModel = Callable[..., DeepseekV3ForCausalLM]
# Prompts of 6, 1 and 2 tokens with samples (segments 0, 3, 7), and two lone sequences, one of a single token.
LENGTHS = [6, 4, 9, 1, 3, 5, 5, 2, 2, 7, 1]
PARENT = [-1, 0, 0, -1, 3, 3, -1, -1, 7, 7, -1]
CU = torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.fixture
def row() -> tuple[torch.Tensor, SequenceLayout, torch.Tensor, torch.Tensor]:
    """(ids, layout, source, target): every own token of a sample but the first is a target."""
    ids = torch.randint(0, 40, (int(CU[-1]),))
    for s, parent in enumerate(PARENT):
        if parent >= 0:  # the samples of a prompt begin alike
            ids[CU[s]] = ids[CU[PARENT.index(parent)]]
    source = torch.cat([torch.arange(CU[s], CU[s + 1] - 1) for s in range(len(LENGTHS)) if s not in PARENT])
    return ids, SequenceLayout.from_segments(CU, PARENT), source, ids[source + 1]


def by_sequence(model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """From the equations, a sequence at a time: position i reads token i + k and predicts token i + k + 1."""
    pieces, depth = ids.split(LENGTHS), len(model.mtp_layers)
    result = {name: torch.zeros(depth) for name in ("loss_sum", "count", "correct", "agree")}
    for s, parent in enumerate(PARENT):
        if s in PARENT:
            continue
        prompt = LENGTHS[parent] if parent >= 0 else 0
        sequence = torch.cat((pieces[parent], pieces[s])) if prompt else pieces[s]
        n, out = len(sequence), model(sequence[None])
        hidden, likeliest = out.hidden[0], out.logits[0].argmax(-1)
        for k, layer in enumerate(model.mtp_layers, start=1):
            if n - k < 1:
                break
            kept = SequenceLayout.from_batch(1, n - k)
            cos, sin = model.model.rotary(kept.position_ids)
            hidden, _ = layer.predict(hidden[: n - k], model.model.embed_tokens(sequence[k:]), cos, sin, kept)
            at = torch.arange(max(prompt - k, 0), n - k - 1)  # the first own token of a sample is no target
            logits, target = model.lm_head(hidden[at]), sequence[at + k + 1]
            result["loss_sum"][k - 1] += F.cross_entropy(logits, target, reduction="sum")
            result["count"][k - 1] += len(at)
            result["correct"][k - 1] += (logits.argmax(-1) == target).sum()
            result["agree"][k - 1] += (logits.argmax(-1) == likeliest[at + k]).sum()
    return result


def gradients(model: DeepseekV3ForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model: DeepseekV3ForCausalLM, row: tuple, detach: bool = False) -> MTPLoss:
    ids, layout, source, target = row
    return mtp_loss(model, model.forward_packed(ids, layout).hidden, ids, layout, source, target, detach)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_equals_sequence_by_sequence(depth: int, make_model: MakeModel, row: tuple) -> None:
    """Loss, counts and every gradient; so no target and no look-ahead crosses into another sample."""
    model = make_model(num_nextn_predict_layers=depth)
    got, want = packed(model, row), by_sequence(model, row[0])
    torch.testing.assert_close(got.loss_sum, want["loss_sum"], rtol=1e-5, atol=1e-4)
    for name in ("count", "correct", "agree"):
        assert getattr(got, name).tolist() == want[name].tolist(), name
    torch.testing.assert_close(got.loss, (want["loss_sum"] / want["count"]).mean())
    ours, plain = gradients(model, got.loss_sum.sum()), gradients(model, want["loss_sum"].sum())
    assert ours.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name, grad in plain.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_experts_are_counted_where_there_is_a_token_to_read(make_model: MakeModel) -> None:
    """Of sequences of 9 and 4 tokens, depth k computes 9 - k and 4 - k; K experts each."""
    model, layout = make_model(num_nextn_predict_layers=2), SequenceLayout.from_segments([0, 9, 13])
    ids, source = torch.randint(0, 40, (13,)), torch.tensor([0, 5, 9])
    result = mtp_loss(model, model.forward_packed(ids, layout).hidden, ids, layout, source, ids[source + 1], True)
    assert result.expert_counts.shape == (2, 8)
    assert result.expert_counts.sum(1).tolist() == [2 * (8 + 3), 2 * (7 + 2)]
    assert result.count.tolist() == [1, 1]  # the others have nothing before them


def test_logits_in_chunks_change_nothing(make_model: MakeModel, row: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(num_nextn_predict_layers=2)
    whole = packed(model, row)
    want = gradients(model, whole.loss)
    monkeypatch.setattr(mtp_module, "CHUNK_LOGITS", 5 * 40)
    parts = packed(model, row)
    torch.testing.assert_close(parts.loss_sum, whole.loss_sum)
    assert torch.equal(parts.agree, whole.agree) and torch.equal(parts.correct, whole.correct)
    for name, grad in gradients(model, parts.loss).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_what_the_gradient_reaches(make_model: MakeModel, row: tuple, detach: bool) -> None:
    model = make_model(num_nextn_predict_layers=2)
    reached = {name for name, grad in gradients(model, packed(model, row, detach).loss).items() if grad.any()}
    own = {name for name, _ in model.named_parameters() if name.startswith("mtp_layers.")}
    assert reached == (own if detach else {name for name, _ in model.named_parameters()})


def test_errors(make_model: MakeModel, row: tuple) -> None:
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0"):
        packed(make_model(), row)
    ids = row[0].clone()
    ids[CU[2]] = (ids[CU[1]] + 1) % 40
    with pytest.raises(AssertionError, match="begin with different tokens"):
        packed(make_model(num_nextn_predict_layers=1), (ids, *row[1:]))
