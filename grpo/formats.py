"""Data sets as other frameworks store them: which columns hold what, and what has to be rearranged.

Nothing is guessed: `data.format` names the framework, and a key given beside it counts.
"""

from __future__ import annotations

from typing import Any

# What each framework's documentation calls the columns; data.* keys. A name with dots leads into nested columns.
FORMATS: dict[str, dict[str, str]] = {
    "trl": {"prompt_column": "prompt", "completion_column": "completion", "answer_column": "solution"},
    "verl": {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth"},
    "openrlhf": {"prompt_column": "input", "answer_column": "label"},
    "slime": {"prompt_column": "prompt", "answer_column": "label"},
}

MISSING: Any = object()


def filled_in(given: dict[str, Any]) -> dict[str, Any]:
    """The `data` section with the columns of its format, where it does not name others."""
    columns = dict(FORMATS.get(str(given.get("format", "")), {}))
    if given.get("completion_template"):  # instead of a column
        columns.pop("completion_column", None)
    return {**columns, **given}


def lookup(columns: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a path such as `reward_model.ground_truth`; MISSING where there is none."""
    if name in columns:
        return columns[name]
    value: Any = columns
    for key in name.split("."):
        value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
    return value


def with_prompt(columns: dict[str, Any]) -> dict[str, Any]:
    """A TRL row. Preference pairs without a prompt get one: what `chosen` and `rejected` begin with alike.

    As in TRL, text is cut before the space that precedes the first difference. Raises ValueError where they have no
    common beginning, or are not both text or both messages.
    """
    if "prompt" in columns or not {"chosen", "rejected"} <= columns.keys():
        return columns
    chosen, rejected = columns["chosen"], columns["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise ValueError("chosen and rejected must both be text, or both be lists of chat messages")
    pairs = enumerate(zip(chosen, rejected))
    same = next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and same and chosen[same - 1] == " ":
        same -= 1
    if not same:
        raise ValueError("chosen and rejected have no common beginning to serve as the prompt; add a prompt column")
    return {**columns, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}
