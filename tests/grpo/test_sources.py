"""Sources: all forms of a file agree, operands are held out for real and everywhere alike, errors name the line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.config import DataConfig
from grpo.sources import Row, load_rows

ROOT = Path(__file__).resolve().parents[2]
CHAIN_SUM = {
    "task": "chain_sum",
    "task_options": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "prompt_pattern": r": (.*)$",
    "size": 1500,
    "eval_size": 0,
}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def error(call: Any, *args: Any, **options: Any) -> str:
    """The ValueError of a call, checked to be one line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert text and "\n" not in text, f"not one line: {text!r}"
    return text


# ---- sources


def test_all_forms_of_a_file_give_the_same_rows(tmp_path: Path) -> None:
    columns = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(20)]
    paths = [jsonl(tmp_path / "d.jsonl", [*columns[:3], "", *columns[3:]])]  # an empty line is no row
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(columns), tmp_path / "d.parquet")
    paths.append(str(tmp_path / "d.parquet"))
    train, held_out = load_rows(DataConfig(path=paths[0]))
    assert train and held_out
    assert {row.columns["prompt"] for row in train + held_out} == {row["prompt"] for row in columns}
    for path in paths[1:]:
        again = load_rows(DataConfig(path=path))
        assert [[row.columns for row in side] for side in again] == [
            [row.columns for row in s] for s in (train, held_out)
        ]
    by_prompt = {row.columns["prompt"]: row for row in train + held_out}
    assert by_prompt["2+3="].id == "d.jsonl:3" and by_prompt["3+4="].id == "d.jsonl:5"  # after the empty line
    assert by_prompt["3+4="].where == f"{paths[0]}:5"


def test_a_directory_of_hf_datasets_gives_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(5)])
    data.save_to_disk(str(tmp_path / "d"))
    train, held_out = load_rows(DataConfig(path=str(tmp_path / "d"), holdout=0))
    assert [row.columns["answer"] for row in train] == ["1", "2", "3", "4", "5"] and held_out == []
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "both"))
    assert f"holds the splits train; give one, e.g. '{tmp_path}/both/train'" in error(
        load_rows, DataConfig(path=str(tmp_path / "both"))
    )


def test_an_evaluation_takes_the_same_part_of_the_held_out_file_each_time(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": f"{i}=", "answer": i} for i in range(100)])
    config = DataConfig(path=path, eval_path=path, eval_size=10)
    train, held_out = load_rows(config)
    numbers = [int(row.columns["answer"]) for row in held_out]
    assert len(train) == 100 and len(set(numbers)) == 10 and numbers == sorted(numbers)
    assert numbers != list(range(10)), "the first rows are not a fair part of a sorted file"
    assert load_rows(config)[1] == held_out


# ---- tasks and the held-out split


def test_a_task_gives_distinct_problems_and_held_out_operands_are_in_no_training_problem() -> None:
    pytest.importorskip("reasoning_gym")
    train, held_out = load_rows(DataConfig(**CHAIN_SUM))
    assert len(train) + len(held_out) == 1500
    assert 0.07 < len(held_out) / 1500 < 0.13
    assert len({row.columns["question"] for row in train + held_out}) == 1500
    for row in train[:50]:
        assert eval(row.columns["metadata"]["expression"]) == int(row.columns["answer"])

    def operands(rows: list[Row]) -> set[tuple[str, ...]]:
        return {tuple(sorted(re.findall(r"\d+", row.columns["question"]))) for row in rows}

    assert operands(train).isdisjoint(operands(held_out))


def test_a_smaller_task_is_the_beginning_of_a_larger_one() -> None:
    pytest.importorskip("reasoning_gym")
    small, large = (load_rows(DataConfig(**{**CHAIN_SUM, "size": size, "holdout": 0}))[0] for size in (40, 80))
    assert large[:40] == small


def test_the_split_is_the_same_in_another_process_with_another_hash_seed() -> None:
    pytest.importorskip("reasoning_gym")
    code = (
        "import sys, json; from grpo.config import DataConfig; from grpo.data import load_rows;"
        "sides = load_rows(DataConfig(**json.loads(sys.argv[1])));"
        "assert 'torch' not in sys.modules; print(json.dumps([[row.id for row in side] for side in sides]))"
    )
    options = {**CHAIN_SUM, "size": 300}
    sides = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, json.dumps(options)],
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                check=True,
                capture_output=True,
            ).stdout
        )
        for seed in ("1", "2")
    ]
    assert sides[0] == sides[1] == [[row.id for row in side] for side in load_rows(DataConfig(**options))]


def test_orders_and_signs_of_the_same_numbers_are_on_one_side(tmp_path: Path) -> None:
    texts = [
        text for a in range(30) for b in range(a) for text in (f"{a}+{b}=", f"{b}+{a}=", f"{a}-{b}=", f"0{b}+{a}=")
    ]
    words = [f"spell {chr(97 + i % 26) * (1 + i // 26)}" for i in range(200)]
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": text, "answer": ""} for text in texts + words])
    train, held_out = load_rows(DataConfig(path=path, eval_size=0, holdout=0.2))
    sides = {row.columns["prompt"]: side for side, rows in enumerate((train, held_out)) for row in rows}
    for i in range(0, len(texts), 4):
        assert len({sides[text] for text in texts[i : i + 4]}) == 1, texts[i : i + 4]
    assert 0.15 < sum(sides[text] for text in texts) / len(texts) < 0.25
    assert 0.12 < sum(sides[text] for text in words) / len(words) < 0.28  # without numbers: by text


def test_few_rows_still_give_both_sides(tmp_path: Path) -> None:
    for count in range(2, 9):
        path = jsonl(tmp_path / f"{count}.jsonl", [{"prompt": f"word{'x' * i}", "answer": ""} for i in range(count)])
        for share in (0.01, 0.5, 0.99):
            train, held_out = load_rows(DataConfig(path=path, holdout=share))
            assert train and held_out and len(train) + len(held_out) == count
    path = jsonl(tmp_path / "one.jsonl", [{"prompt": "1+2=", "answer": 3}])
    assert [len(side) for side in load_rows(DataConfig(path=path, holdout=0.99))] == [1, 0]


def test_pretraining_text_is_split_without_a_prompt_column(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": f"text number {i}"} for i in range(200)])
    train, held_out = load_rows(DataConfig(path=path))
    assert len(train) + len(held_out) == 200 and 8 <= len(held_out) <= 32


# ---- errors


def test_errors_of_sources(tmp_path: Path) -> None:
    def of(name: str, content: str, **options: Any) -> str:
        (tmp_path / name).write_text(content)
        return error(load_rows, DataConfig(path=str(tmp_path / name), **options))

    good = '{"prompt": "1=", "answer": 1}\n'
    missing = str(tmp_path / "no.jsonl")
    assert error(load_rows, DataConfig()).startswith("data.path and data.task are both empty; set ")
    assert f"data.path '{missing}' does not exist" in error(load_rows, DataConfig(path=missing))
    assert f"data.eval_path '{missing}' does not exist" in error(
        load_rows, DataConfig(path=jsonl(tmp_path / "ok.jsonl", [good]), eval_path=missing)
    )
    assert f"{tmp_path}/bad.jsonl:2: not a line of JSON" in of("bad.jsonl", good + '{"prompt": \n')
    assert f"{tmp_path}/list.jsonl:1: a JSON list" in of("list.jsonl", "[1]\n")
    assert "has no rows" in of("empty.jsonl", "\n")
    assert "ends in '.csv'; known are" in of("d.csv", "a,b\n")
    assert "is not a Parquet file" in of("d.parquet", "no")
    assert f"{tmp_path}/column.jsonl:1: no column 'prompt'; it has question, answer; set data.prompt_column" in of(
        "column.jsonl", '{"question": "1=", "answer": 1}\n'
    )
    assert f"{tmp_path}/blank.jsonl:2: the prompt is empty" in of("blank.jsonl", good + '{"prompt": " "}\n')
    assert f"{tmp_path}/match.jsonl:1: data.prompt_pattern 'Q(.)' does not match column 'prompt': '1='" in of(
        "match.jsonl", good, prompt_pattern="Q(.)"
    )
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    assert "not a directory written by datasets' save_to_disk" in error(
        load_rows, DataConfig(path=str(tmp_path / "folder"))
    )


def test_errors_of_tasks() -> None:
    pytest.importorskip("reasoning_gym")

    def of(**options: Any) -> str:
        return error(load_rows, DataConfig(**{**CHAIN_SUM, **options}))

    assert "data.task 'chain_summ' is not a task of reasoning-gym; did you mean 'chain_sum'?" in of(task="chain_summ")
    assert "data.task_options {'min_term': 2} do not suit task 'chain_sum'" in of(task_options={"min_term": 2})
    assert "max_terms must be >= min_terms" in of(task_options={"min_terms": 9, "max_terms": 2})
    assert "use data.size" in of(task_options={"size": 9})
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    found = re.search(
        r"data.size is 900, but task 'chain_sum' gave only (\d+) different problems", of(task_options=few, size=900)
    )
    assert found and int(found[1]) <= 200  # 10 x 10 operands, two signs


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("reasoning_gym", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'grpo-v3[tasks]'" in error(load_rows, DataConfig(task="chain_sum"))
    assert "pip install 'grpo-v3[tasks]'" in error(load_rows, DataConfig(path=str(tmp_path)))
