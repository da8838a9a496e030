"""The repetition reward: a penalty for saying the same n-grams again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.records import RewardInput
from rewards.rule import Rule, each

_ONE_BY_ONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # Japanese, Chinese, Korean: a character is a word
_WORD = re.compile(rf"[{_ONE_BY_ONE}]|[^\W{_ONE_BY_ONE}]+|[^\w\s]")
_LONGEST = 200_000  # characters, or a quarter as many tokens, counted from the end, where loops are


def repetition(*, ngram_size: int = 3, max_penalty: float = -1.0, unit: str = "words") -> Rule:
    """max_penalty * (1 - different n-grams / all n-grams): 0 where none comes twice, near max_penalty in a loop.

    The n-gram penalty of Demystifying Long Chain-of-Thought Reasoning (arXiv 2502.03373), as TRL and open-r1 count it.
    `unit`: "words" (case does not matter, a punctuation mark is a word) or "tokens" (completion_ids; without them the
    reward does not apply). Fewer units than `ngram_size` are no repetition: 0. ValueError: ngram_size below 1, a
    max_penalty above 0, another unit.
    """
    if isinstance(ngram_size, bool) or not isinstance(ngram_size, int) or ngram_size < 1:
        raise ValueError(f"rewards.repetition.ngram_size is {ngram_size!r}; give a number of {unit}, 1 or more")
    if isinstance(max_penalty, bool) or not isinstance(max_penalty, int | float) or not -1e9 < max_penalty <= 0:
        raise ValueError(f"rewards.repetition.max_penalty is {max_penalty!r}; give a number of at most 0")
    if unit not in ("words", "tokens"):
        raise ValueError(f"rewards.repetition.unit is {unit!r}; give words or tokens")

    def score(sample: RewardInput) -> float | None:
        if unit == "words":
            return max_penalty * repeated_share(_WORD.findall(sample.completion[-_LONGEST:].casefold()), ngram_size)
        if sample.completion_ids is None:
            return None
        return max_penalty * repeated_share(list(sample.completion_ids)[-_LONGEST // 4 :], ngram_size)

    return Rule(each(score), bounds=(float(max_penalty), 0.0))


def repeated_share(units: Sequence[str] | Sequence[int], size: int) -> float:
    """1 - different n-grams / all n-grams; 0 where there is none."""
    count = len(units) - size + 1
    return 1 - len(set(zip(*(units[start:] for start in range(size))))) / count if count > 0 else 0.0
