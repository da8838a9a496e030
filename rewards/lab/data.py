"""Data for the lab: JSONL or Parquet rows become samples with labels and groups. Everything wrong is found here.

Besides a sample a row it reads a row of several samples (a comma list of columns, or a column of lists), pairs
(`chosen`, `rejected`), and GSM8K's model_solutions.jsonl as it is published.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.records import RewardInput

# Other names people give the columns: what a message about a missing one suggests.
ALIASES = {
    "prompt": ("question", "problem", "instruction", "query", "input"),
    "completion": ("response", "solution", "output", "generation", "text"),
    "answer": ("ground_truth", "gold", "target", "reference", "solution"),
    "label": ("is_correct", "correct", "score"),
    "group": ("prompt_id", "id"),
}
SOURCE_COLUMNS = ("source", "data_source")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what: dotted paths, with commas between several. Empty: the default, or what is recognised."""

    prompt: str = ""
    completion: str = ""
    answer: str = ""
    label: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class LabData:
    """Samples to score. The sequences are as long as `inputs`; `inputs[i].group` tells which samples share a prompt."""

    path: str
    rows: int
    shape: str  # rows, pairs or gsm8k_model_solutions
    columns: Mapping[str, str | None]
    inputs: Sequence[RewardInput]
    labels: Sequence[float | None]
    where: Sequence[str]  # file:line
    names: Sequence[str]  # of a sample within its row
    sources: Sequence[str | None]


def load(path: str | Path, columns: Columns = Columns(), needs_answer: bool = True) -> LabData:
    """Reads the file. Raises ValueError naming file, line, column and remedy.

    prompt, completion and answer are the default columns; a label is read only where one is named or the shape of the
    file has it. Samples are grouped by `group`, else by equal prompts. `needs_answer`: a row without one is an error.
    """
    path = Path(path)
    rows = list(_read(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    shape, columns = _recognise(rows[0][1], columns)
    samples: list[_Sample] = []
    for number, row in rows:
        samples += _samples(f"{path}:{number}", row, columns, shape, needs_answer)
    sources = next((name for name in SOURCE_COLUMNS if name in rows[0][1]), None)
    keys: dict[str, str] = {}
    inputs = []
    for sample in samples:
        if columns.group:
            group = str(_value(sample.where, sample.row, columns.group, "group"))
        else:
            key = json.dumps(sample.prompt, ensure_ascii=False, default=str)
            group = keys.setdefault(key, str(len(keys)))
        ids = sample.row.get("completion_ids")
        inputs.append(
            RewardInput(
                prompt=sample.prompt,
                completion=sample.completion,
                fields=sample.fields,
                completion_ids=ids if isinstance(ids, list) and all(type(i) is int for i in ids) else None,
                truncated=sample.row.get("truncated") is True,
                group=group,
            )
        )
    named = {key: getattr(columns, key) or None for key in ("prompt", "completion", "answer", "label", "group")}
    return LabData(
        str(path),
        len(rows),
        shape,
        {**named, "source": sources},
        inputs,
        [sample.label for sample in samples],
        [sample.where for sample in samples],
        [sample.name for sample in samples],
        [None if sources is None else str(sample.row.get(sources)) for sample in samples],
    )


@dataclass(slots=True)
class _Sample:
    where: str
    name: str
    row: dict[str, Any]
    prompt: Any
    completion: str
    fields: dict[str, Any]
    label: float | None


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; give a JSONL or Parquet file of prompts and completions")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{str(path)!r} is not a Parquet file: {' '.join(str(error).split())}") from None
        yield from enumerate(table.to_pylist(), start=1)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; known are .jsonl, .json and .parquet")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: not a line of JSON ({error}); give one object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a JSON {type(row).__name__}; give one object a line")
            yield number, row


def _recognise(row: Mapping[str, Any], given: Columns) -> tuple[str, Columns]:
    """The shape of the file, read off its first row, and the columns with defaults filled in."""
    models = [
        name for name, value in row.items() if isinstance(value, dict) and {"solution", "is_correct"} <= value.keys()
    ]
    if models and {"question", "ground_truth"} <= row.keys() and not (given.completion or given.label):
        solutions, labels = ([f"{model}.{key}" for model in models] for key in ("solution", "is_correct"))
        return "gsm8k_model_solutions", Columns(
            given.prompt or "question",
            ",".join(solutions),
            given.answer or "ground_truth",
            ",".join(labels),
            given.group,
        )
    pairs = {"chosen", "rejected"} <= row.keys() and not given.completion
    return "pairs" if pairs else "rows", Columns(
        given.prompt or "prompt",
        "chosen,rejected" if pairs else given.completion or "completion",
        given.answer or "answer",
        given.label,
        given.group,
    )


def _samples(where: str, row: dict[str, Any], columns: Columns, shape: str, needs_answer: bool) -> Iterator[_Sample]:
    pairs = shape == "pairs"
    paths = [path.strip() for path in columns.completion.split(",")]
    values = [_value(where, row, path, "completion") for path in paths]
    names = [path.removesuffix(".solution") for path in paths]
    if len(values) == 1 and isinstance(values[0], list) and not _is_chat(values[0]):  # a column of lists
        values = values[0]
        names = [str(place) for place in range(len(values))]
    elif len(values) == 1:
        names = [""]
    labels: list[float | None] = (
        [1.0, 0.0] if pairs and not columns.label else _labels(where, row, columns, len(values))
    )
    fields = dict(row)
    answer = _answer(where, row, columns, needs_answer)
    if answer is not None:
        fields["answer"] = answer
    for name, value, label in zip(names, values, labels, strict=True):
        prompt, completion = _texts(where, row, columns, value, may_have_prompt=pairs)
        yield _Sample(where, name, row, prompt, completion, fields, label)


def _texts(where: str, row: Mapping[str, Any], columns: Columns, value: Any, may_have_prompt: bool) -> tuple[Any, str]:
    """(prompt, completion) of one sample; a chat's completion is what its last message says."""
    before: list[Any] = []
    if _is_chat(value):
        before, value = value[:-1], value[-1]["content"]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: column {columns.completion!r} holds a {type(value).__name__}; a completion is text "
            "or a list of chat messages"
        )
    if may_have_prompt and before and columns.prompt not in row:
        return before, value
    prompt = _value(where, row, columns.prompt, "prompt")
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(
            f"{where}: column {columns.prompt!r} holds a {type(prompt).__name__}; a prompt is text or a list of "
            "chat messages"
        )
    return prompt, value


def _labels(where: str, row: Mapping[str, Any], columns: Columns, count: int) -> list[float | None]:
    if not columns.label:
        return [None] * count
    paths = [path.strip() for path in columns.label.split(",")]
    values = [_value(where, row, path, "label") for path in paths]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if len(values) != count:
        raise ValueError(
            f"{where}: {count} completions ({columns.completion}) and {len(values)} labels ({columns.label}); "
            "name a label for each completion"
        )
    for value in values:
        if value is not None and (not isinstance(value, bool | int | float) or not math.isfinite(value)):
            raise ValueError(
                f"{where}: label {value!r:.80} in column {columns.label!r} is not a number; "
                "write 1 or true for right, 0 or false for wrong, or a grade"
            )
    return [None if value is None else float(value) for value in values]


def _answer(where: str, row: Mapping[str, Any], columns: Columns, needed: bool) -> Any:
    if not needed and not _has(row, columns.answer):
        return None
    value = _value(where, row, columns.answer, "answer")
    if value is None and needed:
        raise ValueError(
            f"{where}: the gold answer in column {columns.answer!r} is null; fill it in or leave the row out"
        )
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _has(row: Mapping[str, Any], path: str) -> bool:
    value: Any = row
    for key in [path] if path in row else path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def _value(where: str, row: Mapping[str, Any], path: str, job: str) -> Any:
    """The value at a dotted path. ValueError names the nearest column there is and the option that names another."""
    if not _has(row, path):
        names = [*row, *(f"{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value)]
        close = (
            difflib.get_close_matches(path, names, n=1, cutoff=0.6)
            or [name for name in ALIASES[job] if name in row and path == job]
            or difflib.get_close_matches(path, names, n=1, cutoff=0.0)
        )
        near = f", did you mean {close[0]!r}?" if close else ";"
        raise ValueError(
            f"{where}: no column {path!r}{near} it has {', '.join(row)}; name the {job}'s column with --{job}"
        )
    value: Any = row
    for key in [path] if path in row else path.split("."):
        value = value[key]
    return value


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, Mapping) and isinstance(entry.get("content"), str) for entry in value)
    )
