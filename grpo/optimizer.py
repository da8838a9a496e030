"""AdamW over FP32 master weights: torch's own, or with moments kept in BF16, as DeepSeek-V3 was trained.

Source: arXiv 2412.19437, section 3.3.3: master weights and gradients in FP32, first and second moments in BF16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from grpo.training_sections import MAX_BETA2_BF16
from model.kernels import usable

CHUNK = 1 << 24  # numbers updated at a time: bounds the FP32 copies of moments to 128 MiB


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) whose moments are BF16 between steps: 4 bytes a weight instead of 8.

    Each step is computed in FP32 and rounded to BF16 once. BF16 has 8 bits of mantissa: a second moment that shrinks
    by less than 1/256 in a step might never shrink, so beta2 is at most 0.996 (ValueError above). State per parameter:
    `step` float32 scalar, `exp_avg` and `exp_avg_sq` bfloat16 of the parameter's shape, as torch's AdamW names them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if betas[1] > MAX_BETA2_BF16:
            raise ValueError(
                f"beta2 {betas[1]}: with BF16 moments at most {MAX_BETA2_BF16}, or the second never shrinks"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, scales: Mapping[torch.Tensor, float] | None = None
    ) -> None:
        """scales: what the gradients of these parameters are multiplied by."""
        assert closure is None, "a closure is not called"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    scale = 1.0 if scales is None else scales.get(parameter, 1.0)
                    self._update(parameter, parameter.grad, scale, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, scale: float, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        if usable(parameter):
            from model.kernels.adamw import adamw_

            moments, rates = (state["exp_avg"], state["exp_avg_sq"]), (group["lr"], group["betas"])
            adamw_(
                parameter, gradient, scale, *moments, int(state["step"]), *rates, group["eps"], group["weight_decay"]
            )
            return
        (beta1, beta2), step = group["betas"], int(state["step"])
        shrink, size = 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**step)
        flat = [t.view(-1) for t in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weight, grad, first, second in zip(*(t.split(CHUNK) for t in flat)):  # each [up to CHUNK]
            grad = grad if scale == 1 else grad * scale
            m = first.to(torch.float32, copy=True).lerp_(grad, 1 - beta1)
            v = second.to(torch.float32, copy=True).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            first.copy_(m)
            second.copy_(v)
            denominator = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
            weight.mul_(shrink).addcdiv_(m, denominator, value=-size)


@torch.no_grad()
def step_with_scales(optimizer: torch.optim.Optimizer, scales: Mapping[torch.Tensor, float]) -> None:
    """A step with the gradients of these parameters multiplied by their scales (how far each is clipped).

    LowMemoryAdamW multiplies as it reads them, which saves a pass over all gradients.
    """
    if isinstance(optimizer, LowMemoryAdamW):
        optimizer.step(scales=scales)
        return
    for parameter, scale in scales.items():
        if parameter.grad is not None and scale != 1:
            parameter.grad.mul_(scale)
    optimizer.step()


def build_optimizer(
    master: Iterable[torch.Tensor],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    moment_dtype: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """AdamW over FP32 parameters; weight decay falls on matrices only."""
    master = list(master)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in master if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in master if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if moment_dtype == torch.bfloat16:
        return LowMemoryAdamW(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
