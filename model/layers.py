"""The small layers everything else is made of: embedding, RMSNorm and the gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import usable


class Embedding(nn.Embedding):
    """torch's, with a gradient that is added to where it is summed up."""

    def forward(self, input: Tensor) -> Tensor:
        """input # [T] int64 -> # [T, d]."""
        if usable(self.weight) and input.dim() == 1:
            from model.kernels.embedding import embedded

            return embedded(input, self.weight)
        return super().forward(input)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; inside FP32, result in the dtype of x."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if usable(x):
            from model.kernels.norms import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # As transformers: normalise in FP32 (rms_norm does), round, then multiply by the weight.
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.eps)

    def added(self, x: Tensor, delta: Tensor | None, readers: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x and delta # [T, D] -> (x + delta, its norm once for each of its readers, up to 3).

        All get one tensor. A kernel adds up their gradients, and that of the sum, where it has them in its hands.
        """
        if usable(x):
            from model.kernels.norms import added_norm

            return added_norm(x, delta, self.weight, self.eps, readers)
        x = x if delta is None else x + delta
        return x, (self(x),) * readers

    def front(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x # [T, D + R] -> (the norm of its first D columns # [T, D], the others as they are # [T, R])."""
        if usable(x):
            from model.kernels.norms import front_norm

            return front_norm(x, self.weight, self.eps)
        front, rest = x.split((len(self.weight), x.shape[1] - len(self.weight)), dim=-1)
        return self(front), rest


class MLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)); a dense feed-forward layer or the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if usable(x):
            from model.kernels.experts import gated

            return self.down_proj(gated(gate, up))
        return self.down_proj(F.silu(gate) * up)
