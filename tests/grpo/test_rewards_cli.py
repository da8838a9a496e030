"""`grpo rewards`: what is printed, exit codes 0, 1 and 2, and a recipe's rewards checked on its own data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import command

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `grpo rewards ARGV`."""
    return command.run(capfd, "rewards", *argv)


@pytest.fixture
def answers(tmp_path: Path) -> str:
    rows = [
        {"prompt": "1+1=", "completion": completion, "answer": "2", "ok": ok}
        for completion, ok in (("<answer>2</answer>", 1), ("2", 1), ("<answer>3</answer>", 0), ("4", 0))
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(tmp_path: Path, rewards: dict[str, Any], rows: list[dict[str, Any]], **data: Any) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    content = {"data": {"path": str(tmp_path / "rows.jsonl"), **data}, "rewards": rewards}
    path.write_text(yaml.safe_dump(content))
    return str(path)


SUMS = [{"prompt": f"{n}+{n}=", "answer": f"so #### {2 * n}"} for n in range(20)]
GOLD = {"answer_pattern": "#### (.+)", "completion_template": "<answer>{answer}</answer>"}

# ---- evaluate


def test_evaluate_says_it_in_words_and_writes_the_contract(
    answers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lab"
    argv = ["evaluate", answers, "--reward", "exact_match,format_tags", "--label", "ok", "--out", str(out)]
    code, printed, err = run(capfd, *argv, "--format_tags.tags=[answer]", "--fail-if", "exact_match.fpr>0")
    assert (code, err) == (0, ""), err
    lines = printed.splitlines()
    assert len(lines) <= 12 and lines[-1].endswith(f"report: {out / 'report.html'}")
    assert any("exact_match: FNR 50.0 % (1/2 right answers go unpaid)" in line for line in lines), printed
    report = json.loads((out / "report.json").read_text())
    block = report["rewards"]["exact_match"]
    assert (block["accuracy"], block["fpr"], block["fnr"]) == (0.75, 0.0, 0.5)
    assert block["zero_variance_share"] == {"4": 0.0, "8": None, "16": None}
    assert report["settings"]["rewards"]["format_tags"] == {"weight": 1.0, "tags": ["answer"]}


def test_evaluate_ends_with_1_where_a_condition_holds(
    answers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", answers, "--reward", "exact_match", "--label", "ok", "--out", str(tmp_path / "lab")]
    code, _, err = run(capfd, *argv, "--fail-if", "fnr>0.4")
    assert code == 1 and err.strip() == "--fail-if fnr>0.4: exact_match has fnr 0.5"


def test_evaluate_takes_a_recipes_rewards(answers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, {"exact_match": {"weight": 2.0, "pattern": "(\\d)"}, "format_tags": 1}, SUMS)
    argv = ["evaluate", answers, "--rewards", path, "--reward", "exact_match", "--label", "ok"]
    assert run(capfd, *argv, "--out", str(tmp_path / "lab"))[0] == 0
    report = json.loads((tmp_path / "lab" / "report.json").read_text())
    assert list(report["rewards"]) == ["exact_match"] and report["rewards"]["exact_match"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--reward", "exact_mach"], ["exact_mach", "exact_match"]),
        (["--reward", "exact_match", "--label", "okay"], ["okay", "'ok'", "--label"]),
        (["--reward", "exact_match", "--lable", "ok"], ["--lable", "--label"]),
        (["--reward", "exact_match", "--exact_mach.tag=b"], ["exact_mach"]),
        (["--reward", "exact_match", "--exact_match.tga=b"], ["exact_match.tga", "'tag'"]),
        (["--reward", "exact_match", "--fail-if", "fpr>0.02"], ["--label"]),
        (["--reward", "exact_match", "--unsafe-local"], ["--unsafe-local", "exact_match"]),
        (["--rewards", "none.yaml"], ["none.yaml", "does not exist"]),
        ([], ["--reward"]),
    ],
)
def test_evaluate_refuses_in_one_line(
    answers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    code, printed, err = run(capfd, "evaluate", answers, "--out", str(tmp_path / "lab"), *argv)
    assert (code, printed) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "lab").exists()


# ---- check


def test_check_passes_a_recipe_that_fits_its_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewards = {"exact_match": 1.0, "format_tags": {"tags": ["answer"]}, "soft_overlong": {
        "max_completion_length": 9, "cache": 2}}  # fmt: skip
    code, printed, _ = run(capfd, "check", recipe(tmp_path, rewards, SUMS, **GOLD))
    first, second, third = printed.splitlines()
    assert code == 0
    assert first == "ok    exact_match: all 20 gold answers score 1; saying nothing or another row's answer does not"
    assert second == "ok    format_tags: all 20 gold answers score 1; saying nothing does not"
    assert third.startswith("?     soft_overlong could not be checked: ") and "token ids" in third


def test_check_names_the_rows_that_fail(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [*SUMS, {"prompt": "x", "answer": "#### <answer>9"}]
    (tmp_path / "mine.py").write_text("def kind(completion, prompt):\n    return 1.0\n")
    rewards = {"exact_match": 1.0, "kind": {"function": f"{tmp_path}/mine.py:kind"}}
    code, printed, _ = run(capfd, "check", recipe(tmp_path, rewards, rows, **GOLD))
    assert code == 1
    first, second = printed.splitlines()
    assert first.startswith("FAIL  exact_match: 1 of 21 gold answers do not score 1: rows.jsonl:21 (0); check data.")
    assert second.startswith("FAIL  kind: 21 rows pay 1 for an empty completion: rows.jsonl:")
    code, printed, _ = run(capfd, "check", str(tmp_path / "recipe.yaml"), "--limit", "5")
    assert code == 1 and "kind: 5 rows" in printed


def test_check_uses_what_a_reward_calls_perfect(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No template in the recipe: math_answer boxes the gold itself, format_tags names nothing perfect."""
    rows = [*SUMS[:5], {"prompt": "x", "answer": r"#### \text{}"}]
    path = recipe(tmp_path, {"math_answer": 1.0, "format_tags": 0.1}, rows, answer_pattern="#### (.+)")
    code, printed, _ = run(capfd, "check", path)
    assert code == 1
    assert "FAIL  math_answer: 1 of 6 gold answers do not score 1: rows.jsonl:6 (no gold answer)" in printed
    assert "?     format_tags could not be checked: it names no perfect completion" in printed


def test_check_tells_a_reward_that_ignores_the_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "def lazy(completion, prompt, answer):\n    return float('<answer>' in completion)\n"
    (tmp_path / "mine.py").write_text(code)
    path = recipe(tmp_path, {"lazy": {"function": f"{tmp_path}/mine.py:lazy"}}, SUMS, **GOLD)
    code, printed, _ = run(capfd, "check", path)
    assert code == 1 and "FAIL  lazy: 20 rows pay 1 for another row's gold answer" in printed


def test_check_refuses_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, {"exact_match": 1.0}, [{"prompt": "p", "gold": "1"}])
    code, _, err = run(capfd, "check", path)
    assert code == 2 and "rows.jsonl:1: no column 'answer'" in err and err.count("\n") == 1


# ---- list


def test_list_shows_every_reward(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rewards.build import REGISTRY

    monkeypatch.setenv("COLUMNS", "200")
    code, printed, _ = run(capfd, "list")
    assert code == 0
    rows = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    assert set(REGISTRY) <= set(rows)
    assert "killable worker" in rows["math_answer"] and "answer" in rows["math_answer"]
    assert "option max_completion_length" in rows["soft_overlong"] and "DAPO" in printed
