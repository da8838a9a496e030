"""Report: every recorded number is in it, nothing a model wrote can act in it, and half a run is enough for one."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grpo import report
from grpo.log import RunLog
from grpo.report import sample_table, write_report
from tests.browser import drive

HOSTILE = (
    "</script><script>alert(1)</script><!-- <script </script\t<img src=x onerror=alert(2)> __CONFIG__ __PLOTLY__ "
    "&lt; \\u003c \u2028"
)


class Page(HTMLParser):
    """Tags, what scripts contain, and the text outside of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def sample(step: int, **columns: Any) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": f"p{step}",
        "prompt": f"{step}+1=",
        "sample": 0,
        "completion": str(step + 1),
        "scores": {"exact_match": 1.0},
        "reward": 1.0,
        "status": "ok",
        "advantage": 0.5,
        "policy_version": step - 1,
        "finish_reason": "stop",
        "length": 2,
        **columns,
    }


def read(run_dir: Path) -> tuple[Page, dict[str, Any]]:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.scripts[0])


def lines(data: dict[str, Any], title: str) -> dict[str, tuple[list[int], list[float]]]:
    (chart,) = (chart for chart in data["charts"] if chart["title"] == title)
    return {line["name"]: (line["x"], line["y"]) for line in chart["lines"]}


def test_the_recorded_numbers_are_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run:\n  name: sums\ngrpo:\n  max_steps: 2\n")
    with RunLog(tmp_path) as log:
        log.metrics({"step": 0, "eval/accuracy": 0.25})
        for step in (1, 2):
            log.samples([sample(step)])
            log.metrics(
                {
                    "step": step,
                    "reward": step / 4,
                    "rewards/exact_match/mean": step / 8,
                    "rewards/length/mean": 0.1,
                    "kl": math.nan if step == 1 else 0.5,
                    "sampling/sampling_logp_difference/mean": 1e-7,
                    "sampling/sampling_logp_difference/max": step * 1e-6,
                    "time/rollout": 1.5,
                    "time/learner": 2.0,
                    "step_time": 45.0,
                }
            )
        log.metrics({"step": 3, "eval/accuracy": 0.875})
    page, data = read(tmp_path)
    assert lines(data, "Accuracy") == {"accuracy": ([0, 3], [0.25, 0.875])}
    assert lines(data, "Reward") == {"reward": ([1, 2], [0.25, 0.5])}
    assert lines(data, "Rewards by name") == {"exact_match": ([1, 2], [0.125, 0.25]), "length": ([1, 2], [0.1, 0.1])}
    assert lines(data, "KL to the reference") == {"kl": ([2], [0.5])}
    assert lines(data, "Rollout against learner") == {"mean": ([1, 2], [1e-7, 1e-7]), "max": ([1, 2], [1e-6, 2e-6])}
    assert lines(data, "Time by stage") == {"rollout": ([1, 2], [1.5, 1.5]), "learner": ([1, 2], [2.0, 2.0])}
    assert "Entropy" not in {chart["title"] for chart in data["charts"]}
    for text in (
        "sums",
        "Finished: 3 steps.",
        "0.250 \u2192 0.875",
        "0.250 \u2192 0.500",
        "2 min",
        "2e-06",
        "max_steps: 2",
    ):
        assert text in page.text, text


def test_the_table_has_a_column_for_each_reward(tmp_path: Path) -> None:
    rows = [
        sample(1),
        sample(2, scores={"exact_match": None, "format": 0.5}, reward=None, status="timeout", advantage=None),
    ]
    columns, table, _ = sample_table(rows)
    assert [column["name"] for column in columns] == [
        *("step", "prompt", "completion", "exact_match", "format", "reward", "advantage", "version", "length"),
        *("finish", "status", "prompt id", "sample"),
    ]
    assert table == [
        [1, "1+1=", "2", 1.0, None, 1.0, 0.5, 0, 2, "stop", "ok", "p1", 0],
        [2, "2+1=", "3", None, 0.5, None, None, 1, 2, "stop", "timeout", "p2", 0],
    ]


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"run:\n  name: {json.dumps(HOSTILE)}\n")
    with RunLog(tmp_path) as log:
        log.samples([sample(1, prompt=HOSTILE, completion=HOSTILE, prompt_id=HOSTILE, scores={HOSTILE: 1.0})])
        log.metrics({"step": 1, f"rewards/{HOSTILE}/mean": 0.5})
    page, data = read(tmp_path)
    assert len(page.scripts) == 3 and "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<" not in page.scripts[0], "no tag, open or closed, can stand in the data"
    row = data["samples"][0]
    assert row[1] == row[2] == HOSTILE and HOSTILE in {column["name"] for column in data["columns"]}
    assert lines(data, "Rewards by name") == {HOSTILE: ([1], [0.5])}
    assert HOSTILE in page.text and page.text.count("alert(1)") == 3  # title, heading and configuration
    assert ".innerHTML" not in page.scripts[2] and "document.write" not in page.scripts[2]


def test_the_report_needs_no_network(tmp_path: Path) -> None:
    page, _ = read(tmp_path)
    assert not [(tag, attributes) for tag, attributes in page.tags if {"src", "href"} & set(attributes)]
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and "content" in attributes and "http-equiv" in attributes
    )
    assert policy and policy.startswith("default-src 'none'")
    assert page.scripts[1].lstrip().startswith("/**\n* plotly.js")


@pytest.mark.parametrize("metrics", [None, "", '{"step": 0}\n', '{"step": 1, "reward": 0.5}\n{"step": 2, "rew'])
def test_whatever_a_run_has_recorded_is_enough(tmp_path: Path, metrics: str | None) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "config.yaml").write_text(
        "grpo:\n  max_steps: 9\n: [half\n" if metrics == "" else "grpo: {max_steps: 9}"
    )
    page, data = read(tmp_path)
    assert data["samples"] == []
    if not metrics:
        assert data["charts"] == [] and "No step is recorded yet." in page.text
    elif "reward" in metrics:
        assert lines(data, "Reward") == {"reward": ([1], [0.5])} and "Not finished: step 1 of 9." in page.text


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run directory '.*gone' does not exist"):
        write_report(tmp_path / "gone")


def test_too_many_samples_are_thinned_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [sample(step, sample=i, completion="x" * 100) for step in range(1, 11) for i in range(2)]
    assert len(sample_table(rows)[1]) == 20
    monkeypatch.setattr(report, "MAX_SAMPLE_CHARACTERS", 1000)
    _, table, note = sample_table(rows)
    assert [row[0] for row in table] == [1, 1, 4, 4, 7, 7, 10, 10]
    assert "Samples of 4 of 10 recorded steps" in note


def test_noisy_curves_get_a_moving_average(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in range(100):
            log.metrics({"step": step, "reward": float(step % 2), "grad_norm": 1.0, "learning_rate": 0.1})
    _, data = read(tmp_path)
    charts = {chart["title"]: chart["lines"][0] for chart in data["charts"]}
    assert charts["Reward"]["smooth"][:4] == [1 / 3, 2 / 4, 2 / 5, 3 / 5]  # two on each side, cut at the ends
    assert charts["Gradient norm"]["smooth"] == [1.0] * 100
    assert charts["Learning rate"]["smooth"] is None


def test_page_marks_are_all_filled(tmp_path: Path) -> None:
    page, _ = read(tmp_path)
    assert not re.findall(r"__[A-Z]+__", page.text + page.scripts[0] + page.scripts[2])


DRIVE = """
const seen = [], table = document.getElementById("samples"), body = table.tBodies[0];
const search = document.getElementById("search");
const cells = () => [...body.rows].map(row => row.cells[2].textContent.slice(0, 3));
const look = name => seen.push([name, cells(), document.getElementById("count").textContent]);
const click = name => [...table.tHead.querySelectorAll("button")].find(button => button.textContent === name).click();
const type = text => { search.value = text; search.dispatchEvent(new Event("input")); };
look("start"); click("reward"); look("reward"); click("reward"); look("again"); click("step"); look("step");
type("2+1"); look("prompt"); type("SCRIPT alert"); look("completion"); type("no such"); look("none");
seen.push(["plots", document.querySelectorAll(".js-plotly-plot svg.main-svg").length > 0, document.title]);
seen.push(["width", document.documentElement.scrollWidth <= innerWidth, ""]);
return seen;
"""


@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_sorts_and_searches(tmp_path: Path, width: int) -> None:
    with RunLog(tmp_path) as log:
        log.samples([sample(1, completion="a", reward=0.5), sample(2, completion="b", reward=None)])
        log.samples([sample(3, completion=HOSTILE, reward=10), sample(4, completion="d", reward=2)])
        log.metrics({"step": 1, "reward": 0.5})
    seen, errors = drive(write_report(tmp_path), DRIVE, tmp_path, width)
    evil = HOSTILE[:3]
    assert errors == []
    assert seen == [
        ["start", ["a", "b", evil, "d"], "4 samples"],
        ["reward", [evil, "d", "a", "b"], "4 samples"],  # as numbers, 10 before 2; null last
        ["again", ["a", "d", evil, "b"], "4 samples"],
        ["step", ["d", evil, "b", "a"], "4 samples"],
        ["prompt", ["b"], "1 of 4 samples"],
        ["completion", [evil], "1 of 4 samples"],
        ["none", [], "0 of 4 samples"],
        ["plots", True, tmp_path.name],
        ["width", True, ""],
    ]
