"""Log-probabilities and entropies of chosen tokens from hidden states, without ever holding [R, vocab] for a batch.

Logits exist for one chunk of rows at a time; the backward pass computes them again, unless those of a micro-batch on a
GPU take little memory and are kept. Chunks are of fixed size, so the numbers do not depend on how a batch is cut into
micro-batches. R: rows, d: hidden size, V: vocabulary.
"""

from __future__ import annotations

import torch

from model.kernels import sum_of, usable

CHUNK_LOGITS = 1 << 22  # logits held at a time, 16 MiB in float32
CHUNK_LOGITS_ON_A_GPU = 1 << 29  # 1 GiB in bfloat16: enough rows that reading and writing the head does not dominate
KEPT_ON_A_GPU = 4 << 30  # bytes of logits up to which they are kept: those of 13,000 rows of 160,000 in bfloat16


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, differentiable):  # type: ignore[override]
        fused = usable(hidden)
        rows = max(1, (CHUNK_LOGITS_ON_A_GPU if fused else CHUNK_LOGITS) // weight.shape[0])
        logprobs = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        entropy, norm = torch.empty_like(logprobs), torch.empty_like(logprobs)
        size = len(target) * weight.shape[0] * hidden.element_size()
        keeps = fused and differentiable and any(ctx.needs_input_grad) and size <= KEPT_ON_A_GPU
        ctx.kept = {}  # first row -> logits
        for start in range(0, len(target), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.T  # [r, V]
            if fused:
                from model.kernels.logprobs import chosen_logprobs

                chosen_logprobs(logits, target[part], temperature, logprobs[part], entropy[part], norm[part])
                if keeps:
                    ctx.kept[start] = logits
                continue
            log_all = torch.log_softmax(logits.float() / temperature, dim=-1)  # [r, V]
            logprobs[part] = log_all.gather(1, target[part, None])[:, 0]
            entropy[part] = -(log_all.exp() * log_all).sum(-1)
        ctx.save_for_backward(hidden, weight, target, norm)
        ctx.temperature, ctx.rows, ctx.fused, ctx.parameter = temperature, rows, fused, weight
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _):  # type: ignore[override]
        hidden, weight, target, norm = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # under an adapter the head stays as it is
        total = sum_of(ctx.parameter) if ctx.needs_input_grad[1] else None
        grad_weight = total
        for start in range(0, len(target), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = ctx.kept.pop(start, None)  # [r, V]; the gradient is written over them
            if logits is None:
                logits = hidden[part] @ weight.T
            # d logp[target] / d logits = onehot - softmax
            if ctx.fused:
                from model.kernels.logprobs import logits_gradient_

                grad = logits_gradient_(logits, target[part], ctx.temperature, norm[part], grad_logprobs[part])
            else:
                grad = torch.softmax(logits.float() / ctx.temperature, dim=-1).neg_()
                grad.scatter_add_(1, target[part, None], torch.ones_like(grad[:, :1]))
                grad = (grad * (grad_logprobs[part, None] / ctx.temperature)).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if ctx.needs_input_grad[1]:
                grad_weight = _sum_of_products(grad_weight, grad.T, hidden[part])
        if total is not None:
            return grad_hidden, None, None, None, None  # the gradient is where it was added
        if ctx.needs_input_grad[1] and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _sum_of_products(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total # [N, K] float32 (None: nothing) plus a # [N, M] times b # [M, K], added by the product where it can."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return (a @ b).float() if total is None else total.add_(a @ b)


def token_logprobs(
    hidden: torch.Tensor, head_weight: torch.Tensor, target: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log-softmax(hidden @ head_weight.T / temperature) at `target`, and the entropy of each row.

    hidden [R, d], head_weight [V, d], target [R] int64 -> logprobs [R] float32 (differentiable), entropy [R] float32
    (no gradient).
    """
    differentiable = torch.is_grad_enabled()  # inside it never is, and inputs want gradients whether or not
    return _ChunkedLogprobs.apply(hidden, head_weight, target, temperature, differentiable)  # type: ignore[no-any-return]
