"""Chunked log-probabilities against torch.log_softmax over all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from grpo import logprobs
from grpo.logprobs import token_logprobs

ROWS, HIDDEN, VOCAB = 23, 12, 50


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, weight, target


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4 * VOCAB, 5 * VOCAB + 7, ROWS * VOCAB, 1 << 22])
def test_equals_log_softmax(monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk)
    hidden, weight, target = inputs()
    got, entropy = token_logprobs(hidden, weight, target, temperature)
    table = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    want = table[torch.arange(ROWS), target]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=table).entropy(), rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad

    upstream = torch.linspace(-1, 2, ROWS)
    got_grads = torch.autograd.grad(got, (hidden, weight), upstream)
    want_grads = torch.autograd.grad(want, (hidden, weight), upstream)
    torch.testing.assert_close(got_grads[0], want_grads[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grads[1], want_grads[1], rtol=1e-5, atol=1e-5)


def test_bfloat16_gives_float32_numbers_and_bfloat16_gradients() -> None:
    hidden, weight, target = inputs(torch.bfloat16)
    got, entropy = token_logprobs(hidden, weight, target, 0.7)
    assert got.dtype == entropy.dtype == torch.float32
    want = torch.log_softmax((hidden @ weight.T).float() / 0.7, dim=-1)[torch.arange(ROWS), target]
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad(got.sum(), (hidden, weight))
    want_grads = torch.autograd.grad(want.sum(), (hidden, weight))
    for got_grad, want_grad in zip(got_grads, want_grads):
        assert got_grad.dtype == torch.bfloat16
        torch.testing.assert_close(got_grad, want_grad, rtol=0.03, atol=0.03)


class WidestRows(TorchFunctionMode):
    """Remembers the most rows of any tensor [rows, VOCAB] that an operation gave, the transposed head aside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCAB and len(out) != HIDDEN:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_never_holds_logits_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 4 * VOCAB + 3)
    hidden, weight, target = inputs()
    with WidestRows() as forward:
        got, _ = token_logprobs(hidden, weight, target)
    kept = [tuple(t.shape) for t in got.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert kept == [(ROWS, HIDDEN), (VOCAB, HIDDEN), (ROWS,), (ROWS,)]
    assert forward.rows == 4
    # the engine runs backward on threads of its own, where modes are off: call the function itself
    with WidestRows() as backward:
        logprobs._ChunkedLogprobs.backward(got.grad_fn, torch.ones(ROWS), None)
    assert backward.rows == 4


def test_no_rows() -> None:
    hidden, weight, _ = inputs()
    got, entropy = token_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    got.sum().backward()
    assert got.shape == entropy.shape == (0,)
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_head_is_added_to_its_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 5 * VOCAB)
    hidden, weight, target = inputs(dtype)
    token_logprobs(hidden, weight, target)[0].sum().backward()
    once, weight.grad = weight.grad, None
    master = torch.zeros_like(weight, dtype=torch.float32)
    weight.master = master  # type: ignore[attr-defined]
    for _ in range(2):
        token_logprobs(hidden, weight, target)[0].sum().backward()
    assert weight.grad is None and master.grad is not None and once is not None
    low = dtype == torch.bfloat16
    torch.testing.assert_close(master.grad / 2, once.float(), rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-6)
