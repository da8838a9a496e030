"""Rewards that read only how long a completion is, in tokens. Without completion_ids they do not apply."""

from __future__ import annotations

from rewards.records import RewardInput
from rewards.rule import Rule, each


def _positive(name: str, value: int, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"rewards.{name} is {value!r}; give a number of tokens, {at_least} or more")


def length(*, max: int | None = None, target: int | None = None) -> Rule:
    """A penalty from -1 to 0, linear in the number of completion tokens n.

    `max`: -min(1, n / max), shorter is better. `target`: -min(1, |n - target| / target), nearer is better. Combine
    with `gated_by` a correctness reward, or the empty completion wins. ValueError: not exactly one of the two, or not
    positive.
    """
    if (max is None) == (target is None):
        raise ValueError("rewards.length needs exactly one of max and target (tokens)")
    _positive("length.max" if target is None else "length.target", max if target is None else target)  # type: ignore[arg-type]

    def score(sample: RewardInput) -> float | None:
        if sample.completion_ids is None:
            return None
        tokens = len(sample.completion_ids)
        ratio = abs(tokens - target) / target if target is not None else tokens / max  # type: ignore[operator]
        return -min(1.0, ratio)

    return Rule(each(score), bounds=(-1.0, 0.0))


def soft_overlong(*, max_completion_length: int, cache: int) -> Rule:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), from -1 to 0, for n completion tokens.

    0 up to max_completion_length - cache, then linear down to -1 at max_completion_length, -1 beyond. ValueError:
    cache not in [1, max_completion_length].
    """
    _positive("soft_overlong.max_completion_length", max_completion_length)
    _positive("soft_overlong.cache", cache)
    if cache > max_completion_length:
        raise ValueError(
            f"rewards.soft_overlong.cache is {cache}, more than max_completion_length {max_completion_length}; lower it"
        )

    def score(sample: RewardInput) -> float | None:
        if sample.completion_ids is None:
            return None
        over = len(sample.completion_ids) - (max_completion_length - cache)
        return -min(1.0, over / cache) if over > 0 else 0.0

    return Rule(each(score), bounds=(-1.0, 0.0))
