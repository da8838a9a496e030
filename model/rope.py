"""Rotary position embedding with YaRN: frequencies, cos/sin tables and the rotation of interleaved pairs."""

import math

import torch
from torch import Tensor

from model.config import DeepseekV3Config, yarn_mscale


def yarn_ramp_bounds(
    dim: int, theta: float, original_max_position: int, beta_fast: float, beta_slow: float, truncate: bool = True
) -> tuple[float, float]:
    """Pair indices between which YaRN blends the frequencies (arXiv 2309.00071, section 3.2); V3: (10, 23).

    Below the first, frequencies stay; above the second they are divided by the factor.
    """

    def pair_with_rotations(rotations: float) -> float:
        return dim * math.log(original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_rotations(beta_fast), pair_with_rotations(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def inverse_frequencies(config: DeepseekV3Config) -> Tensor:
    """Rotation per position of each pair, FP32 `# [d_r / 2]`: theta^(-2j/d_r), then YaRN when the config has it."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # [d_r / 2]
    if scaling is None:
        return frequencies
    low, high = yarn_ramp_bounds(
        dim,
        config.rope_theta,
        scaling["original_max_position_embeddings"],
        scaling["beta_fast"],
        scaling["beta_slow"],
        scaling.get("truncate", True),
    )
    if low == high:
        high += 0.001  # the ramp is then a step; avoids 0 / 0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)  # [d_r / 2]
    return frequencies / scaling["factor"] * ramp + frequencies * (1 - ramp)


def attention_factor(config: DeepseekV3Config) -> float:
    """What cos and sin are multiplied by: mscale over mscale_all_dim, 1 for every released DeepSeek-V3."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(scaling["factor"], mscale) / yarn_mscale(scaling["factor"], mscale_all_dim)
    return yarn_mscale(scaling["factor"], 1.0)


class RotaryTables:
    """cos and sin of given positions.

    Not a Module on purpose: a buffer would follow `model.to(bfloat16)`, and BF16 frequencies are wrong after
    a few hundred positions.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        self.config = config
        self.factor = attention_factor(config)
        self._inverse: dict[torch.device, Tensor] = {}

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids `# [T]` -> cos, sin, both FP32 `# [T, d_r / 2]`."""
        device = position_ids.device
        if device not in self._inverse:
            with torch.device("cpu"):  # real numbers even when the model is being built on meta
                self._inverse[device] = inverse_frequencies(self.config).to(device)
        angles = position_ids.float()[:, None] * self._inverse[device]  # [T, d_r / 2]
        return angles.cos() * self.factor, angles.sin() * self.factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of `x # [T, d_r]` or `# [T, heads, d_r]` by the angles `# [T, d_r / 2]`.

    The result keeps the interleaved order (DeepSeek's code and vLLM's cache; transformers returns half-split order,
    with equal dot products). Computed in FP32, returned in the dtype of x.
    """
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # [T, 1, d_r / 2]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [.., d_r / 2] each
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
