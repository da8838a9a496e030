"""The lab's data: every shape becomes the same samples, and bad input is one line that names line and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.lab.data import Columns, load


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(path: Path, *words: str, columns: Columns | None = None) -> None:
    with pytest.raises(ValueError) as caught:
        load(path, columns or Columns())
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


ROW = {"prompt": "1+1=", "completion": "2", "answer": 2, "ok": True, "source": "sums"}


def test_rows_of_jsonl_and_parquet_are_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [ROW, ROW | {"completion": "3", "ok": False}, ROW | {"prompt": "2+2=", "answer": "4", "ok": None}]
    rows[2]["answer"] = rows[0]["answer"]  # Parquet wants one type
    file = jsonl(tmp_path / "d.jsonl", rows[0], "", *rows[1:])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    a, b = (load(path, Columns(label="ok")) for path in (file, tmp_path / "d.parquet"))
    assert [sample.group for sample in a.inputs] == ["0", "0", "1"]
    assert a.labels == [1.0, 0.0, None] == b.labels
    assert a.inputs[1].completion == "3" and a.inputs[0].fields["answer"] == "2" and a.inputs[0].fields["ok"] is True
    assert list(a.inputs) == list(b.inputs)
    assert a.where[1] == f"{file}:3" and a.sources == ["sums"] * 3 and a.rows == 3


def test_columns_of_several_samples_and_dotted_paths(tmp_path: Path) -> None:
    row = {"q": {"text": "1+1="}, "a": {"out": "2", "ok": 1}, "b": {"out": "3", "ok": 0}, "id": 7, "answer": "2"}
    path = jsonl(tmp_path / "d.jsonl", row)
    data = load(path, Columns("q.text", "a.out, b.out", label="a.ok,b.ok", group="id"))
    assert [(s.prompt, s.completion, s.group) for s in data.inputs] == [("1+1=", "2", "7"), ("1+1=", "3", "7")]
    assert data.labels == [1.0, 0.0] and data.names == ["a.out", "b.out"]
    path = jsonl(tmp_path / "e.jsonl", {"prompt": "p", "completion": ["x", "y"], "answer": "x", "ok": [0.5, None]})
    data = load(path, Columns(label="ok"))
    assert [s.completion for s in data.inputs] == ["x", "y"] and data.labels == [0.5, None]


def test_gsm8k_model_solutions_need_no_options(tmp_path: Path) -> None:
    row = {"question": "q", "ground_truth": "g\nA: 18"} | {
        name: {"solution": f"A: {n}", "is_correct": n == 18} for name, n in (("6b", 18), ("175b", 3))
    }
    data = load(jsonl(tmp_path / "s.jsonl", row))
    assert data.shape == "gsm8k_model_solutions" and data.names == ["6b", "175b"] and data.labels == [1.0, 0.0]
    assert data.inputs[1].completion == "A: 3" and data.inputs[1].fields["answer"] == "g\nA: 18"


def test_pairs_are_two_samples(tmp_path: Path) -> None:
    def chat(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]

    path = jsonl(tmp_path / "p.jsonl", {"chosen": chat("good"), "rejected": chat("bad")})
    data = load(path, needs_answer=False)
    assert data.shape == "pairs" and data.labels == [1.0, 0.0]
    assert [s.completion for s in data.inputs] == ["good", "bad"]
    assert data.inputs[0].prompt == [{"role": "user", "content": "hi"}] and data.inputs[0].group == data.inputs[1].group
    path = jsonl(tmp_path / "q.jsonl", {"prompt": "hi", "chosen": "good", "rejected": "bad"})
    assert [s.prompt for s in load(path, needs_answer=False).inputs] == ["hi", "hi"]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "d.jsonl", ROW)
    refused(tmp_path / "none.jsonl", "none.jsonl", "does not exist")
    refused(jsonl(tmp_path / "x.csv", ROW), ".csv", ".parquet")
    refused(jsonl(tmp_path / "x.parquet", ROW), "not a Parquet file")
    refused(jsonl(tmp_path / "b.jsonl", ROW, '{"prompt": '), "b.jsonl:2", "JSON")
    refused(jsonl(tmp_path / "l.jsonl", [1]), "l.jsonl:1", "list")
    refused(jsonl(tmp_path / "e.jsonl"), "no rows")
    refused(good, "'anwser'", "did you mean 'answer'", "--answer", columns=Columns(answer="anwser"))
    refused(jsonl(tmp_path / "q.jsonl", {"question": "1", "response": "2", "answer": 1}), "'response'", "--completion")
    refused(good, "label '1+1=' in column 'prompt'", "d.jsonl:1", columns=Columns(label="prompt"))
    refused(good, "1 completions", "2 labels", columns=Columns(label="ok,answer"))
    refused(jsonl(tmp_path / "n.jsonl", ROW | {"answer": None}), "n.jsonl:1", "'answer' is null")
    refused(jsonl(tmp_path / "c.jsonl", ROW | {"completion": 3}), "holds a int")
    assert load(jsonl(tmp_path / "f.jsonl", {"prompt": "p", "completion": "c"}), needs_answer=False).inputs[0].fields
