"""The instruction_following reward: reads a row's instructions as IFEval publishes them, and counts those followed."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.instruction_checks import CHECKS, RELATIONS
from rewards.records import RewardInput, Score
from rewards.rule import Rule, each

Instruction = tuple[str, dict[str, Any]]  # its id, the arguments of its check

_COUNTS = frozenset(
    {
        "num_words",
        "num_sentences",
        "num_paragraphs",
        "nth_paragraph",
        "num_bullets",
        "num_highlights",
        "num_sections",
        "num_placeholders",
        "frequency",
        "let_frequency",
        "capital_frequency",
    }
)
_LISTS = frozenset({"keywords", "forbidden_words"})


def read_instructions(fields: Mapping[str, Any]) -> list[Instruction]:
    """The row's instructions, checked: `instruction_id_list`, and in `kwargs` one mapping of arguments for each.

    Arguments that are None or that the type does not have are ignored, as Parquet gives every row every key. Raises
    ValueError naming the id and the argument for unknown ids, missing arguments and values that make no sense.
    """
    ids, kwargs = fields["instruction_id_list"], fields["kwargs"]
    if not _is_list(ids) or not _is_list(kwargs) or len(ids) != len(kwargs) or not len(ids):
        raise ValueError(
            f"instruction_id_list {ids!r:.80} and kwargs {kwargs!r:.80} must be lists of equal length, not empty"
        )
    return [(str(name), _arguments(str(name), given)) for name, given in zip(ids, kwargs)]


def variants(text: str) -> list[str]:
    """IFEval's eight loose texts: without the first line, the last, both or neither, each with and without its *."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [part.replace("*", "") for part in cut]


def follows(instruction: Instruction, text: str, loose: bool = False) -> bool:
    """Whether the text, or with `loose` one of its variants, follows the instruction. A blank text follows nothing."""
    name, arguments = instruction
    texts = variants(text) if loose else [text]
    return any(CHECKS[name](part, **arguments) for part in texts if part.strip())


def instruction_following(*, mode: str = "strict", partial: bool = False) -> Rule:
    """1.0 if the completion follows every instruction of fields["instruction_id_list"] and ["kwargs"], else 0.0.

    The 25 types of IFEval (arXiv 2311.07911) under their published ids. `mode`: strict, or loose as the paper defines
    it (eight variants of the text, any of which may follow). `partial`: the share of instructions followed instead of
    all or nothing. What precedes the last </think> does not count. info["followed"] tells each instruction's verdict.
    A row with an unknown id or a senseless argument is an error before the run, and an ERROR here. ValueError: a bad
    option, or langdetect is not installed.
    """
    if mode not in ("strict", "loose"):
        raise ValueError(f"rewards.instruction_following.mode is {mode!r}; give strict or loose")
    if not isinstance(partial, bool):
        raise ValueError(f"rewards.instruction_following.partial is {partial!r}; give true or false")
    if importlib.util.find_spec("langdetect") is None:
        raise ValueError("rewards.instruction_following needs langdetect; pip install 'grpo-v3[rewards]'")

    def score(sample: RewardInput) -> Score:
        instructions = read_instructions(sample.fields)
        _, closed, answer = sample.completion.rpartition("</think>")
        text = "" if not closed and "<think>" in answer else answer  # cut off while it was thinking
        verdicts = [follows(instruction, text, mode == "loose") for instruction in instructions]
        share = sum(verdicts) / len(verdicts)
        return Score(share if partial else float(share == 1.0), info={"followed": verdicts})

    def check(fields: Mapping[str, Any]) -> None:
        read_instructions(fields)

    return Rule(each(score), frozenset({"instruction_id_list", "kwargs"}), (0.0, 1.0), check=check)


def _arguments(name: str, given: Any) -> dict[str, Any]:
    if name not in CHECKS:
        near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown instruction id {name!r}, did you mean {near!r}?")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"kwargs of {name!r} are {given!r:.80}; give a mapping of arguments")
    arguments = {}
    for key in list(inspect.signature(CHECKS[name]).parameters)[1:]:
        value = (given or {}).get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how a data frame says None
            raise ValueError(f"{name!r} needs the argument {key!r} in kwargs")
        arguments[key] = _argument(name, key, value)
    return arguments


def _argument(name: str, key: str, value: Any) -> Any:
    if key in _COUNTS:
        value = value.item() if hasattr(value, "item") else value  # numpy's
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
            raise ValueError(f"{name!r} has {key} {value!r}; give a whole number, 0 or more")
        return int(value)
    if key.endswith("relation"):
        if value not in RELATIONS:
            raise ValueError(f"{name!r} has {key} {value!r}; give {' or '.join(map(repr, RELATIONS))}")
        return value
    words = list(value) if key in _LISTS and _is_list(value) else [value]
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"{name!r} has {key} {value!r:.80}; give text{' in a list' if key in _LISTS else ''}")
    if key == "letter" and len(value) != 1:
        raise ValueError(f"{name!r} has letter {value!r}; give one character")
    return words if key in _LISTS else value


def _is_list(value: Any) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or hasattr(value, "tolist")
