"""Rows with preferences or labels as examples for a reward model, and the losses and measures of its scores.

An example is a prompt with its completions: chosen and rejected, or a single one with a label. The texts are the
policy's own: the prompt as make_prompts renders it, then the completion, then the eos token, where the score is read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from grpo.config import Config, RewardModelConfig
from grpo.data import make_prompts
from grpo.sources import Row, column
from model.create import encode

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, completions with their eos token; `value` is the label, or the margin that a pair asks for."""

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    value: float

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt_ids) + max(map(len, self.completions))


def read_examples(rows: Sequence[Row], config: Config, tokenizer: Any, context: int) -> list[Example]:
    """Rows as examples, in order. Raises ValueError naming file and line for what cannot be used.

    Rows with more than reward_model.max_length tokens (0: `context`) are an error, or left out with a count under
    data.drop_long_prompts.
    """
    section = _section(config)
    limit = section.max_length or context
    if limit > context:
        raise ValueError(f"reward_model.max_length is {limit}, but the model's context is {context}; lower it")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, where the score is read; set eos_token in its config")
    by_id, dropped, examples = {row.id: row for row in rows}, 0, []
    for prompt in make_prompts(rows, config.data, tokenizer, limit, gold=False):
        row = by_id[prompt.id]
        texts, value = _pair(row, section) if is_paired(section) else _labelled(row, section, config)
        try:
            completions = tuple((*encode(tokenizer, text), tokenizer.eos_token_id) for text in texts)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        example = Example(tuple(prompt.token_ids), completions, value)
        if example.longest <= limit:
            examples.append(example)
        elif not config.data.drop_long_prompts:
            raise ValueError(
                f"{row.where}: prompt and completion have {example.longest} tokens, more than {limit} "
                "(reward_model.max_length, or the context); shorten them or set data.drop_long_prompts: true"
            )
        else:
            dropped += 1
    if dropped:
        log.warning("left out %d of %d rows with more than %d tokens", dropped, len(rows), limit)
    if rows and not examples:
        raise ValueError(f"all {len(rows)} rows have more than {limit} tokens; raise reward_model.max_length")
    return examples


def is_paired(section: RewardModelConfig) -> bool:
    """Whether examples are pairs; else they are completions with labels."""
    return section.loss_type == "bradley_terry"


def example_losses(scores: torch.Tensor, values: torch.Tensor, section: RewardModelConfig) -> torch.Tensor:
    """[N] float32 from the scores [N, C] of an example's completions and its value [N].

    Bradley-Terry (Ouyang et al. 2203.02155, eq. 1) with the margin of Llama 2 (2307.09288, eq. 2) and the centring
    term of Eisenstein et al. (2312.09244, eq. 2); squared error; binary cross-entropy on sigmoid(score).
    """
    if section.loss_type == "mse":
        return (scores[:, 0] - values).square()
    if section.loss_type == "bce":
        return F.binary_cross_entropy_with_logits(scores[:, 0], values, reduction="none")
    centring = section.center_rewards_coefficient * scores.sum(1).square()
    return centring - F.logsigmoid(scores[:, 0] - scores[:, 1] - values)


def right(scores: np.ndarray, values: np.ndarray, section: RewardModelConfig) -> np.ndarray | None:
    """[N] 1 where the scores [N, C] say what the example does, 0.5 on a tie; None: squared error knows no right."""
    if section.loss_type == "mse":
        return None
    if section.loss_type == "bce":
        return 0.5 + 0.5 * np.sign(scores[:, 0]) * np.where(values > 0.5, 1, -1)
    return 0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1])


def measures(scores: np.ndarray, values: np.ndarray, section: RewardModelConfig) -> dict[str, float]:
    """loss, accuracy (where there is one) and auc of the scores [N, C] of examples with values [N].

    auc: share of two completions, of any prompts, that the scores put in the order of their labels (chosen above
    rejected), ties counting half; ROC-AUC where there are two labels. NaN where all labels are equal.
    """
    paired = is_paired(section)
    losses = example_losses(torch.from_numpy(scores), torch.from_numpy(values).to(torch.float32), section)
    result = {"loss": float(losses.mean())}
    if (verdicts := right(scores, values, section)) is not None:
        result["accuracy"] = float(verdicts.mean())
    labels = np.tile([1.0, 0.0], len(scores)) if paired else values
    result["auc"] = concordance(scores.ravel(), labels)
    if paired:
        result["margin"] = float((scores[:, 0] - scores[:, 1]).mean())
    return result


def concordance(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(score_i > score_j | label_i > label_j), ties counting half; scores, labels [N]. NaN without such a pair."""
    total = count = 0.0
    for label in np.unique(labels):
        low = np.sort(scores[labels < label])
        high = scores[labels == label]
        total += np.sum(np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")) / 2
        count += len(low) * len(high)
    return float(total / count) if count else math.nan


# ---- rows


def _section(config: Config) -> RewardModelConfig:
    assert config.reward_model is not None, "no reward_model section"
    return config.reward_model


def _pair(row: Row, section: RewardModelConfig) -> tuple[list[str], float]:
    names = {"chosen_column": section.chosen_column, "rejected_column": section.rejected_column}
    texts = [_text(row, name, f"reward_model.{key}") for key, name in names.items()]
    if texts[0] == texts[1]:
        raise ValueError(f"{row.where}: chosen and rejected are equal, so there is no preference; remove the row")
    margin = row.columns.get(section.margin_column)
    return texts, 0.0 if margin is None else _number(row, section.margin_column, margin)


def _labelled(row: Row, section: RewardModelConfig, config: Config) -> tuple[list[str], float]:
    text = _text(row, config.data.completion_column or "completion", "data.completion_column")
    label = _number(row, section.label_column, column(row, section.label_column, "reward_model.label_column"))
    if section.loss_type == "bce" and not 0 <= label <= 1:
        raise ValueError(
            f"{row.where}: column {section.label_column!r} is {label:g}; reward_model.loss_type bce needs 0 to 1"
        )
    return [text], label


def _text(row: Row, name: str, key: str) -> str:
    """A completion: text, or the only message of a list, the assistant's."""
    value = column(row, name, key)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content") if value[0].get("role") == "assistant" else value
    if not isinstance(value, str):
        raise ValueError(
            f"{row.where}: column {name!r} is {value!r:.80}; a completion is text, or a list of one assistant message"
        )
    return value


def _number(row: Row, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):  # a bool is a label, too
        raise ValueError(f"{row.where}: column {name!r} is {value!r:.80}; it must be a finite number")
    return float(value)
