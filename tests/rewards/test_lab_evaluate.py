"""An evaluation from file to report: its numbers, its files, what it says in words, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rewards.lab import conditions
from rewards.lab.data import Columns
from rewards.lab.evaluate import Evaluation, Options, evaluate

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
LABELLED = Options(Columns(label="label"))


def lab(tmp_path: Path, rows: list[dict[str, Any]], rewards: dict[str, Any], options: Options = LABELLED) -> Evaluation:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate(path, rewards, tmp_path / "out", options)


def rows_of(*groups: str, gold: str = "7") -> list[dict[str, Any]]:
    """A group a word, a sample a letter: R right and tagged, W wrong and tagged, r right without tags, F a wrong one
    that is labelled right."""
    texts = {
        "R": f"<answer>{gold}</answer>",
        "W": "<answer>1</answer>",
        "r": f"it is {gold}",
        "F": "<answer>2</answer>",
    }
    return [
        {"prompt": f"p{number}", "completion": texts[letter], "answer": gold, "label": letter in "RrF"}
        for number, word in enumerate(groups)
        for letter in word
    ]


def lines(evaluation: Evaluation, reward: str | None = "exact_match") -> str:
    return "\n".join(
        f"{line['text']}; {line['remedy']}" for line in evaluation.report["verdicts"] if line["reward"] == reward
    )


def test_numbers_of_a_small_evaluation(tmp_path: Path) -> None:
    rows = rows_of("RRWW", "RRRR", "WWWW", "RWWr")
    rows.append({"prompt": "p4", "completion": "<answer>7</answer>", "answer": "7", "label": 0})
    found = lab(tmp_path, rows, {"exact_match": 1.0, "format_tags": {"weight": 0.5, "tags": ["answer"]}})
    report = found.report
    block = report["rewards"]["exact_match"]
    assert block["confusion"] == {"tp": 7, "fp": 1, "fn": 1, "tn": 8, "unscored": 0}
    assert (block["accuracy"], block["fpr"], block["fnr"]) == pytest.approx((15 / 17, 1 / 9, 1 / 8))
    assert block["zero_variance_share"] == {"4": 0.5, "8": None, "16": None}
    expected = [2 * 0.5**4, 1, 1, 0.25**4 + 0.75**4, 1]
    assert block["expected_zero_variance"]["4"] == pytest.approx(sum(expected) / 5)
    assert (block["all_zero_share"], block["all_one_share"]) == (0.25, 0.25)  # the single sample is no group
    assert block["statuses"]["ok"] == 17 and block["mean"] == pytest.approx(8 / 17)
    low, high = block["ci"]["accuracy"]
    assert 0.5 <= low <= block["accuracy"] <= high <= 1
    assert {row["slice"]: row["samples"] for row in block["slices"] if row["by"] == "format"} == {
        "<answer>": 16,
        "number": 1,
    }
    assert report["data"]["groups"] == 5 and report["data"]["group_size"]["max"] == 4
    (pair,) = report["agreement"]
    assert (pair["both"], pair["only_a"], pair["only_b"], pair["neither"]) == (8, 0, 8, 1)
    curve = report["curves"]["label"]
    assert curve["pass_at_1"] == pytest.approx((0.5 + 1 + 0 + 0.5 + 0) / 5)
    assert curve["pass_at_k"][-1] == {"k": 4, "value": 0.75, "ci": curve["pass_at_k"][-1]["ci"]}
    assert curve["maj_at_k"][-1]["value"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)  # two ties of 2 and 2
    assert sum(report["total"]["gradient_share"].values()) == pytest.approx(1)
    assert report["total"]["samples"] == 17 and set(report["total"]["gradient_share"]) == {"exact_match", "format_tags"}
    flips = [row["flips"] for name in report["rewards"] for row in report["rewards"][name]["determinism"]]
    assert len(flips) == 6 and not any(flips)


def test_files_hold_every_sample_and_every_disagreement(tmp_path: Path) -> None:
    import pyarrow.parquet

    found = lab(tmp_path, rows_of("RWrF"), {"exact_match": 1.0})
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "report.json", "report.html", "scores.parquet", "disagreements.jsonl"
    }  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == found.report
    table = pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()
    assert [row["exact_match.value"] for row in table] == [1, 0, 0, 0] and [row["label"] for row in table] == [
        1,
        0,
        1,
        1,
    ]
    assert table[2]["where"].endswith("rows.jsonl:3") and table[2]["exact_match.status"] == "ok"
    wrong = [json.loads(line) for line in (out / "disagreements.jsonl").read_text().splitlines()]
    assert [(row["row"], row["kind"], row["reward"]) for row in wrong] == [
        (2, "false_negative", "exact_match"),
        (3, "false_negative", "exact_match"),
    ]


def test_a_perfect_reward_is_said_to_be_one(tmp_path: Path) -> None:
    found = lab(tmp_path, rows_of("RRWW", "RWWW"), {"exact_match": 1.0})
    assert "agrees with the labels on all 8 samples: 100.0 %" in lines(found)
    assert found.report["rewards"]["exact_match"]["snr"] is None  # nothing but signal
    assert found.report["rewards"]["exact_match"]["signal_share"] == pytest.approx(1)


def test_template_mismatch_is_named_with_its_remedy(tmp_path: Path) -> None:
    rows = rows_of("RWRW", "RRWW")
    for row in rows:
        row["completion"] = "so\nA: " + row["completion"][8]
    found = lab(tmp_path, rows, {"exact_match": 1.0})
    assert found.report["rewards"]["exact_match"]["fnr"] == 1.0
    assert "every group has zero variance" in lines(found)
    assert "template mismatch: 100.0 % of them end in 'A: n'" in lines(found) and "gsm8k_answer" in lines(found)


def test_raw_latex_gold_is_named(tmp_path: Path) -> None:
    rows = rows_of("RRWW", "RWWW") + rows_of("rrWW", "rWWW", gold=r"\frac{1}{2}")
    for number, row in enumerate(rows):
        row["prompt"] += str(number // 8)
    found = lab(tmp_path, rows, {"exact_match": 1.0})
    assert r"FNR 50.0 % (3/6 right answers go unpaid) - 3 of 3 have raw LaTeX gold; wrap the gold" in lines(found)


def test_failures_and_chance_are_said(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import itertools\ncalls = itertools.count()\n"
        "def shaky(completion, prompt):\n    return next(calls) % 2\n"
        "def broken(completion, prompt):\n    raise RuntimeError('no server')\n"
    )
    rewards = {name: {"function": f"{tmp_path}/mine.py:{name}"} for name in ("shaky", "broken")}
    found = lab(tmp_path, rows_of("RW", "RW", "RW"), rewards, Options(workers=1, repeat=2))
    assert "6 of 6 samples have no score, status error: RuntimeError: no server" in lines(found, "broken")
    assert "is not deterministic" in lines(found, "shaky")
    assert "no labels" in lines(found, None)
    block = found.report["rewards"]["broken"]
    assert block["accuracy"] is None and block["zero_variance_share"]["4"] is None and block["error_share"] == 1
    checks = [row["check"] for row in found.report["rewards"]["shaky"]["determinism"]]
    assert checks == ["order", "batch size", "batch size", "workers", "repeat"]
    json.dumps(found.report, allow_nan=False)


def test_graded_scores_are_ranked(tmp_path: Path) -> None:
    """A length reward against labels: what it prefers is said, as AUC and as correlation with length."""
    rows = []
    for number in range(30):
        for size, label in ((2 + number, 1), (50 + number, 0), (70 + number, 0)):
            row = {"prompt": str(number), "completion": "x" * size, "completion_ids": [1] * size, "label": label}
            rows.append(row)
    found = lab(tmp_path, rows, {"length": {"max": 200}})
    block = found.report["rewards"]["length"]
    assert (block["auc"], block["pair_accuracy"], block["auc_within_group"]) == (1, 1, 1)
    assert block["best_of_n"][0] == pytest.approx(
        {"n": 2, "groups": 30, "reward": 2 / 3, "oracle": 2 / 3, "random": 1 / 3, "regret": 0}
    )
    assert block["spearman_length"] == pytest.approx(-1) and block["ece"] < 0.05
    assert "ranks right above wrong with AUC 1.000" in lines(found, "length")
    assert "pays wrong answers more the shorter they are" in lines(found, "length")


def test_conditions(tmp_path: Path) -> None:
    options = Options(Columns(label="label"), fail_if=["fpr>0.02, exact_match.fnr >= 50%", "accuracy<0.9"])
    found = lab(tmp_path, rows_of("RrWW"), {"exact_match": 1.0}, options)
    assert found.failed == [
        "exact_match.fnr >= 50%: exact_match has fnr 0.5",
        "accuracy<0.9: exact_match has accuracy 0.75",
    ]
    assert conditions.holding(
        conditions.parse(["zero_variance_share.8>0"], ["exact_match"], True, False), found.report
    ) == ["zero_variance_share.8>0: exact_match has no zero_variance_share.8 on these data"]
    for text, labelled, words in (
        ("frp>0.1", True, "did you mean 'fpr'?"),
        ("fpr", True, "METRIC>NUMBER"),
        ("fpr>0.1", False, "--label"),
        ("probes_failed>0", True, "--probes"),
    ):
        with pytest.raises(ValueError, match=words.replace("?", r"\?")):
            conditions.parse([text], ["exact_match"], labelled, False)


def test_refused_before_any_work(tmp_path: Path) -> None:
    rows, ran = rows_of("RW"), []

    def refused(words: str, rewards: dict[str, Any], options: Options = LABELLED, data: list[Any] = rows) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
        with pytest.raises(ValueError, match=words):
            evaluate(path, rewards, tmp_path / "out", options, lambda *progress: ran.append(progress))

    refused("did you mean 'exact_match'", {"exact_mach": 1.0})
    refused("reward exact_match needs the column 'answer'", {"exact_match": {"when": {"prompt": "p0"}}}, data=[
        {"prompt": "p0", "completion": "c", "label": 1}
    ])  # fmt: skip
    refused("--label", {"exact_match": 1.0}, Options(Columns(label="lable")))
    refused("did you mean 'fnr'", {"exact_match": 1.0}, Options(Columns(label="label"), fail_if=["fnrr>1"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    refused("not empty.*--overwrite", {"exact_match": 1.0})
    refused("holds no report", {"exact_match": 1.0}, Options(overwrite=True))
    assert not ran


def test_overwrite_replaces_the_report_alone(tmp_path: Path) -> None:
    lab(tmp_path, rows_of("RW"), {"exact_match": 1.0})
    (tmp_path / "out" / "notes.txt").write_text("mine")
    again = lab(tmp_path, rows_of("RRWW"), {"exact_match": 1.0}, Options(Columns(label="label"), overwrite=True))
    assert again.report["data"]["samples"] == 4 and (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_at_most_twelve_lines(tmp_path: Path) -> None:
    """However much is wrong: eleven verdicts, and the console's line that says where the report is."""
    functions = "".join(f"def f{i}(completion, prompt):\n    raise RuntimeError\n" for i in range(14))
    (tmp_path / "many.py").write_text(functions)
    rewards = {f"f{i}": {"function": f"{tmp_path}/many.py:f{i}"} for i in range(14)}
    found = lab(tmp_path, rows_of("RW"), rewards, Options(workers=1))
    assert len(found.report["verdicts"]) == 11
    levels = [line["level"] for line in found.report["verdicts"]]
    assert levels == sorted(levels, key=("bad", "warn", "note", "good").index)


def test_gsm8k_solutions(tmp_path: Path) -> None:
    pytest.importorskip("rewards.gsm8k_answer", reason="the gsm8k_answer reward is not there yet")
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not there")
    found = evaluate(GSM8K, {"gsm8k_answer": 1.0}, tmp_path / "out")
    block = found.report["rewards"]["gsm8k_answer"]
    assert block["samples"] == 5276 and (block["accuracy"], block["fpr"], block["fnr"]) == (1.0, 0.0, 0.0)
    assert block["zero_variance_share"]["4"] == pytest.approx(0.446, abs=5e-4)
    assert block["zero_variance_share"]["8"] is None
    assert "on all 5,276 samples: 100.0 %" in lines(found, "gsm8k_answer")
    assert "44.6 % of groups of 4" in lines(found, "gsm8k_answer")
    assert found.report["seconds"]["total"] < 60
    solved = found.report["curves"]["gsm8k_answer"]
    assert solved["pass_at_1"] == pytest.approx(2001 / 5276, abs=1e-4)


def test_rewards_that_see_groups_get_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewards import RewardInput, Score, build
    from rewards.rule import Rule

    def rank() -> Rule:
        def score(inputs: list[RewardInput]) -> list[Score]:
            for group, members in itertools.groupby(inputs, lambda sample: sample.group):
                assert len(list(members)) == 3, f"group {group} was cut"
            return [Score(float(len(sample.completion))) for sample in inputs]

        return Rule(score, grouped=True)

    monkeypatch.setattr("rewards.text_rules.rank", rank, raising=False)
    monkeypatch.setitem(build.REGISTRY, "rank", "rewards.text_rules:rank")
    found = lab(tmp_path, rows_of(*["RWr"] * 200), {"rank": 1.0})
    assert [row["flips"] for row in found.report["rewards"]["rank"]["determinism"]] == [0, 0, 0]
