"""Prompts: render and tokenise rows, and hand them out in an order that a resumed run goes on with.

load_rows -> make_prompts -> PromptCursor          GRPO and evaluation
load_rows -> sft_examples | text_blocks            supervised stages
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .config import DataConfig
from .formats import MISSING, lookup
from .sources import Row, column, load_rows, match_group, prompt_text

if TYPE_CHECKING:
    from .records import Prompt

__all__ = [
    "PromptCursor",
    "Row",
    "completion_text",
    "load_rows",
    "make_prompts",
    "row_fields",
    "sft_examples",
    "text_blocks",
]

log = logging.getLogger(__name__)


def make_prompts(
    rows: Sequence[Row], config: DataConfig, tokenizer: Any, max_length: int = 0, gold: bool = True
) -> list[Prompt]:
    """Rows rendered and tokenised. `fields` has every column, and the gold answer under "answer".

    `max_length`: tokens that the model's context leaves for a prompt (0: any); data.max_prompt_length may lower it.
    `gold`: False where nobody needs a gold answer, so that its column may be missing.
    Raises ValueError naming the row for a missing or empty column, a pattern that does not match, chat messages
    without a template, and a prompt that is too long (left out instead with data.drop_long_prompts).
    """
    from .records import Prompt  # here, because records.py imports torch

    limit = min((n for n in (config.max_prompt_length, max_length) if n), default=0)
    dropped, prompts = 0, []
    for row in rows:
        text = _with_system_prompt(prompt_text(row, config), row, config)
        token_ids = _tokenise(text, row, config, tokenizer)
        if limit and len(token_ids) > limit:
            if not config.drop_long_prompts:
                raise ValueError(
                    f"{row.where}: prompt has {len(token_ids)} tokens, more than {limit} (data.max_prompt_length, or "
                    "what the context leaves); shorten it, raise the limit or set data.drop_long_prompts: true"
                )
            dropped += 1
            continue
        fields = row_fields(row, config, gold)
        prompts.append(Prompt(id=row.id, text=text, token_ids=tuple(token_ids), fields=fields))
    if dropped:
        log.warning("left out %d of %d prompts with more than %d tokens", dropped, len(rows), limit)
    if rows and not prompts:
        raise ValueError(
            f"all {len(rows)} prompts have more than {limit} tokens; raise data.max_prompt_length or the context"
        )
    return prompts


def row_fields(row: Row, config: DataConfig, gold: bool = True) -> dict[str, Any]:
    """What rewards see of a row: its columns, and the gold answer as "answer". ValueError where `gold` is not there."""
    fields = dict(row.columns)
    if config.answer_column and (gold or not _empty(lookup(row.columns, config.answer_column))):
        fields["answer"] = _gold(row, config)
    return fields


def completion_text(row: Row, config: DataConfig, fields: Mapping[str, Any]) -> str:
    """What SFT trains the model to answer: data.completion_column, or completion_template filled in. ValueError."""
    if config.completion_column:
        text = column(row, config.completion_column, "data.completion_column")
        if isinstance(text, list) and len(text) == 1 and text[0].get("role") == "assistant":
            text = text[0]["content"]
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"{row.where}: column {config.completion_column!r} is {text!r}; it must be text that is not empty"
            )
        return text
    template = config.completion_template
    try:
        return template.format_map(fields)
    except KeyError as err:
        raise ValueError(
            f"{row.where}: data.completion_template {template!r} uses {err}, and the row has {', '.join(fields)}"
        ) from err
    except (ValueError, IndexError, AttributeError) as err:
        raise ValueError(
            f"data.completion_template {template!r} is not a format string ({err}); write {{{{ for {{"
        ) from err


class PromptCursor:
    """Hands out prompts epoch by epoch, each in a new order that is a pure function of (seed, epoch).

    Invariant: a cursor that loads the state of another one goes on exactly as that one would have.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        """Raises ValueError where there are no prompts."""
        if not prompts:
            raise ValueError(
                "there are no prompts to train on; check data.path, data.holdout and data.drop_long_prompts"
            )
        self._prompts, self._seed, self._shuffle = list(prompts), seed, shuffle
        self._position = 0  # prompts handed out since the start of the run
        self._order: tuple[int, list[int]] = (-1, [])  # epoch, its order

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, across the ends of epochs. `visit` is the epoch, as every epoch visits every prompt."""
        taken = []
        for position in range(self._position, self._position + n):
            epoch, offset = divmod(position, len(self._prompts))
            if self._order[0] != epoch:
                self._order = (epoch, self._order_of(epoch))
            taken.append(dataclasses.replace(self._prompts[self._order[1][offset]], visit=epoch))
        self._position += n
        return taken

    def prompt(self, prompt_id: str, visit: int) -> Prompt:
        """One that was handed out before. Raises ValueError if there is none of that id."""
        for prompt in self._prompts:
            if prompt.id == prompt_id:
                return dataclasses.replace(prompt, visit=visit)
        raise ValueError(f"the checkpoint has unfinished samples of the prompt {prompt_id!r}; restore the data")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {"position": self._position, "num_prompts": len(self._prompts), "digest": self._digest()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Raises ValueError if the prompts are not those it was taken with."""
        if state["num_prompts"] != len(self._prompts):
            raise ValueError(
                f"data has {len(self._prompts)} prompts, but the checkpoint was made with {state['num_prompts']}; "
                "restore the data, or start a new run from the checkpoint's weights (model.path)"
            )
        if state["digest"] != self._digest():
            raise ValueError(
                f"data has other prompts than the {len(self._prompts)} of the checkpoint (their digest differs); "
                "restore the data, or start a new run from the checkpoint's weights (model.path)"
            )
        self._position = state["position"]

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:  # sorted by hash: no library's generator has to stay the same for ever
            order.sort(key=lambda i: hashlib.sha256(f"{self._seed}/{epoch}/{i}".encode()).digest())
        return order

    def _digest(self) -> str:
        whole = hashlib.sha256()
        for prompt in self._prompts:
            whole.update(repr((prompt.id, prompt.token_ids)).encode())
        return whole.hexdigest()[:16]


def sft_examples(
    rows: Sequence[Row], config: DataConfig, tokenizer: Any, max_length: int = 0
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of each row; completions end in the eos token.

    The completion is data.completion_column as it is, or data.completion_template filled in with the row's columns,
    where {answer} is the gold answer (data.answer_pattern applied). `max_length`: tokens of prompt and completion
    together (0: any); longer rows are treated as long prompts are. Raises ValueError as make_prompts does, and for
    a missing completion.
    """
    if bool(config.completion_column) == bool(config.completion_template):
        raise ValueError(
            "SFT needs one of data.completion_column and data.completion_template; "
            + ("both are set" if config.completion_column else "neither is set")
        )
    eos, by_id, dropped, examples = _eos(tokenizer), {row.id: row for row in rows}, 0, []
    for prompt in make_prompts(rows, config, tokenizer, max_length, gold=False):
        row = by_id[prompt.id]
        completion = [*_encode(tokenizer, completion_text(row, config, prompt.fields)), eos]
        if max_length and len(prompt.token_ids) + len(completion) > max_length:
            if not config.drop_long_prompts:
                raise ValueError(
                    f"{row.where}: prompt and completion have {len(prompt.token_ids) + len(completion)} tokens, "
                    f"more than {max_length}; shorten them or set data.drop_long_prompts: true"
                )
            dropped += 1
            continue
        examples.append((list(prompt.token_ids), completion))
    if dropped:
        log.warning("left out %d of %d examples with more than %d tokens", dropped, len(rows), max_length)
    return examples


def text_blocks(rows: Sequence[Row], config: DataConfig, tokenizer: Any, block_size: int) -> list[list[int]]:
    """The documents of data.text_column, each followed by the eos token, joined and cut into blocks of `block_size`.

    What is left at the end and does not fill a block is dropped. Raises ValueError for a row without text, and where
    all of it does not fill one block.
    """
    eos, stream = _eos(tokenizer), []
    for row in rows:
        text = column(row, config.text_column, "data.text_column")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{row.where}: column {config.text_column!r} is {text!r}; it must be text that is not empty"
            )
        stream += [*_encode(tokenizer, text), eos]
    blocks = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
    if not blocks:
        raise ValueError(
            f"data has {len(stream)} tokens, less than one block of {block_size}; lower pretrain.block_size or add text"
        )
    return blocks


# ---- columns and tokens ----


def _gold(row: Row, config: DataConfig) -> Any:
    name = config.answer_column
    value = lookup(row.columns, name)
    if _empty(value):
        found = f"{name!r} is null" if value is None else f"no column {name!r}; it has {', '.join(row.columns)}"
        raise ValueError(
            f"{row.where}: {found}; set data.answer_column to the gold answer's column, or to '' if no reward needs one"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if config.answer_pattern:
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: data.answer_pattern needs text in column {name!r}, not {value!r:.80}")
        value = match_group(row, "answer_pattern", config.answer_pattern, name, value).strip()
    return value


def _empty(value: Any) -> bool:
    return value is None or value is MISSING


def _with_system_prompt(text: str | list[dict[str, str]], row: Row, config: DataConfig) -> str | list[dict[str, str]]:
    """Chat messages where the prompt goes through a template, else the string."""
    if isinstance(text, str):
        if not config.system_prompt and config.chat_template != "on":
            return text
        text = [{"role": "user", "content": text}]
    if config.chat_template == "off":
        raise ValueError(
            f"{row.where}: data.chat_template is off, but "
            + ("data.system_prompt is set" if config.system_prompt else "the prompt has chat messages")
            + "; set data.chat_template to auto or give plain strings"
        )
    if not config.system_prompt:
        return text
    if text[0]["role"] == "system":
        raise ValueError(f"{row.where}: the prompt has a system message of its own; leave data.system_prompt empty")
    return [{"role": "system", "content": config.system_prompt}, *text]


def _tokenise(text: str | list[dict[str, str]], row: Row, config: DataConfig, tokenizer: Any) -> list[int]:
    if not isinstance(text, str):
        if not tokenizer.chat_template:
            raise ValueError(
                f"{row.where}: the prompt is a chat, but the tokenizer has no chat template; add chat_template.jinja "
                "to the model directory, or use string prompts with no data.system_prompt and data.chat_template: off"
            )
        text = str(tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False))
    token_ids = _encode(tokenizer, text)
    if not token_ids:
        raise ValueError(
            f"{row.where}: the prompt {text!r:.80} has no tokens; the tokenizer knows none of its characters"
        )
    return token_ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos token, which ends completions and documents; set eos_token in its config"
        )
    return tokenizer.eos_token_id
