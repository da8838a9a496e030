"""Rows: read them from a file or draw them from a task, and hold some out.

Nothing here depends on run.seed, on the machine or on Python's hash seed: every run shares one held-out split.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .config import DataConfig
from .formats import MISSING, lookup, with_prompt
from .needle import needle_rows

# reasoning-gym seeds item i with seed + i, so nearby seeds overlap: there is one seed, and a split by hash.
TASK_SEED = 20250120


class Row(NamedTuple):
    """A row of the source."""

    id: str  # stable over machines and runs: file or task name, and position
    columns: dict[str, Any]
    where: str  # for messages: `file:line`


def load_rows(config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, in source order; the same on every machine and for every run.seed.

    Held out are the rows of `eval_path`, or a share of the source chosen as DataConfig.holdout says; at most eval_size
    of them. Raises ValueError for a missing or broken file, an unknown task, and rows that cannot be used.
    """
    if config.task:
        rows = _task_rows(config)
    elif config.path:
        rows = _read(Path(config.path), "data.path", config.format)
    else:
        raise ValueError("data.path and data.task are both empty; set data.path to a file or data.task to a task name")
    if config.eval_path:
        held_out = [
            row._replace(id=f"eval/{row.id}") for row in _read(Path(config.eval_path), "data.eval_path", config.format)
        ]
    else:
        rows, held_out = _split(rows, config)
    if config.eval_size and len(held_out) > config.eval_size:  # by hash: a file may be sorted by difficulty
        chosen = {row.id for row in sorted(held_out, key=lambda row: _share(row.id))[: config.eval_size]}
        held_out = [row for row in held_out if row.id in chosen]
    return rows, held_out


def prompt_text(row: Row, config: DataConfig) -> str | list[dict[str, str]]:
    """The prompt as the data has it, data.prompt_pattern and data.prompt_template applied.

    Raises ValueError naming the row.
    """
    value = column(row, config.prompt_column, "data.prompt_column")
    if isinstance(value, str):
        if config.prompt_pattern:
            value = match_group(row, "prompt_pattern", config.prompt_pattern, config.prompt_column, value)
        if not value.strip():
            raise ValueError(
                f"{row.where}: the prompt is empty; fill in column {config.prompt_column!r} or remove the row"
            )
        return config.prompt_template.format(value) if config.prompt_template else value
    if not isinstance(value, list):
        raise ValueError(
            f"{row.where}: column {config.prompt_column!r} is a {type(value).__name__}; "
            "a prompt is a string or a list of chat messages"
        )
    for message in value:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise ValueError(
                f"{row.where}: chat message {message!r:.200} in column {config.prompt_column!r} must be an object with "
                "the strings role and content"
            )
    for key in ("prompt_pattern", "prompt_template"):
        if getattr(config, key):
            raise ValueError(f"{row.where}: data.{key} needs string prompts, and this one has chat messages; unset it")
    if not any(message["content"].strip() for message in value):
        raise ValueError(f"{row.where}: the prompt is empty; fill in column {config.prompt_column!r} or remove the row")
    return value


def column(row: Row, name: str, key: str) -> Any:
    """The row's value in a column that `key` names. Raises ValueError with the columns there are."""
    value = lookup(row.columns, name)
    if value is MISSING:
        raise ValueError(
            f"{row.where}: no column {name!r}; it has {', '.join(row.columns) or 'none'}; set {key} to one of them"
        )
    return value


def match_group(row: Row, key: str, pattern: str, column: str, value: str) -> str:
    """What the one group of data.<key> captures in the value of a column. Raises ValueError naming the row."""
    match = re.search(pattern, value)
    if match is None or match[1] is None:
        raise ValueError(f"{row.where}: data.{key} {pattern!r} does not match column {column!r}: {value[-80:]!r}")
    return match[1]


# ---- sources ----


def _read(path: Path, key: str, format: str) -> list[Row]:
    if not path.exists():
        raise ValueError(
            f"{key} {str(path)!r} does not exist; give a JSONL or Parquet file, or a directory of HF datasets"
        )
    if path.is_dir():
        columns = _read_saved_dataset(path, key)
    elif path.suffix == ".parquet":
        columns = _read_parquet(path, key)
    elif path.suffix in (".jsonl", ".json"):
        columns = _read_jsonl(path)
    else:
        raise ValueError(f"{key} {str(path)!r} ends in {path.suffix!r}; known are .jsonl, .json and .parquet")
    rows = [Row(f"{path.name}:{number}", content, f"{path}:{number}") for number, content in columns]
    if not rows:
        raise ValueError(f"{key} {str(path)!r} has no rows")
    return [_trl_row(row) for row in rows] if format == "trl" else rows


def _trl_row(row: Row) -> Row:
    try:
        return row._replace(columns=with_prompt(row.columns))
    except ValueError as err:
        raise ValueError(f"{row.where}: {err}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as err:
                raise ValueError(
                    f"{path}:{number}: not a line of JSON ({err}); one JSON object a line is needed"
                ) from err
            if not isinstance(content, dict):
                raise ValueError(f"{path}:{number}: a JSON {type(content).__name__}; one JSON object a line is needed")
            yield number, content


def _read_parquet(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as err:
        raise ValueError(f"{key} {str(path)!r} is not a Parquet file: {' '.join(str(err).split())}") from err
    yield from enumerate(table.to_pylist(), start=1)


def _read_saved_dataset(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as err:
        raise ValueError(
            f"{key} {str(path)!r} is a directory, which takes HF datasets: pip install 'grpo-v3[tasks]'"
        ) from err
    try:
        data = datasets.load_from_disk(str(path))
    except FileNotFoundError as err:
        raise ValueError(f"{key} {str(path)!r} is not a directory written by datasets' save_to_disk") from err
    if isinstance(data, datasets.DatasetDict):
        splits = [str(name) for name in data]
        raise ValueError(
            f"{key} {str(path)!r} holds the splits {', '.join(splits)}; give one, e.g. {str(path / splits[0])!r}"
        )
    yield from enumerate(data, start=1)  # pyright: ignore[reportReturnType]


def _task_rows(config: DataConfig) -> list[Row]:
    """The first `size` problems of the task with different questions."""
    if config.task == "needle":
        return _needle_rows(config)
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as err:
        raise ValueError(f"data.task {config.task!r} needs reasoning-gym: pip install 'grpo-v3[tasks]'") from err
    if config.task not in DATASETS:
        near = difflib.get_close_matches(config.task, list(DATASETS), n=1, cutoff=0.0)[0]
        raise ValueError(f"data.task {config.task!r} is not a task of reasoning-gym; did you mean {near!r}?")
    if "size" in config.task_options:
        raise ValueError(f"data.task_options.size is {config.task_options['size']!r}; use data.size")
    draws = 1000 + 20 * config.size
    try:
        items = reasoning_gym.create_dataset(config.task, size=draws, **{"seed": TASK_SEED, **config.task_options})
    except (TypeError, ValueError, AssertionError) as err:
        message = " ".join(str(err).split())
        raise ValueError(
            f"data.task_options {config.task_options!r} do not suit task {config.task!r}: {message}"
        ) from err
    problems: dict[str, dict[str, Any]] = {}
    for item in items:
        problems.setdefault(item["question"], item)
        if len(problems) == config.size:
            break
    else:
        raise ValueError(
            f"data.size is {config.size}, but task {config.task!r} gave only {len(problems)} different problems in "
            f"{draws} draws; lower data.size or widen data.task_options"
        )
    rows = []
    for number, item in enumerate(problems.values(), start=1):
        columns = {**item, config.prompt_column: item["question"]}
        if config.answer_column:
            columns[config.answer_column] = item["answer"]
        rows.append(Row(f"{config.task}:{number}", columns, f"{config.task}:{number}"))
    return rows


def _needle_rows(config: DataConfig) -> list[Row]:
    try:
        rows = needle_rows(config.size, TASK_SEED, config.task_options)
    except ValueError as err:
        raise ValueError(f"data.task_options {config.task_options!r} do not suit task 'needle': {err}") from err
    names = {"text": config.text_column, "prompt": config.prompt_column, "answer": config.answer_column}
    return [
        Row(f"needle:{number}", {names.get(key, key): value for key, value in row.items()}, f"needle:{number}")
        for number, row in enumerate(rows, start=1)
    ]


# ---- the held-out split ----


def _split(rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row]]:
    if not config.holdout:
        return rows, []
    shares = [_share(_split_key(row, config)) for row in rows]
    held_out = [share < config.holdout for share in shares]
    low, high = min(shares), max(shares)
    if not any(held_out):  # few rows: each side gets one where there are two different problems
        held_out = [share == low for share in shares]
    if all(held_out):
        held_out = [share < high for share in shares]
    return (
        [row for row, held in zip(rows, held_out) if not held],
        [row for row, held in zip(rows, held_out) if held],
    )


def _split_key(row: Row, config: DataConfig) -> str:
    """What a problem is about: its numbers in any order, so that 3+5, 5+3 and 5-3 are on one side; else its text."""
    if config.text_column in row.columns and lookup(row.columns, config.prompt_column) is MISSING:  # pretraining
        return str(row.columns[config.text_column])
    prompt = prompt_text(row, config)
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?", text)
    return " ".join(sorted(number.lstrip("0") or "0" for number in numbers)) or text


def _share(key: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56
