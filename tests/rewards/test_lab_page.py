"""report.html of the lab: its plots and tables hold the report's numbers, a browser runs it, hostile text is inert."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from rewards.lab import probes, tables
from rewards.lab.data import Columns
from rewards.lab.evaluate import Options, evaluate
from rewards.lab.page import sections, tiles, write_page
from tests.browser import drive

HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> <a href='https://example.com'>link</a> "
    "__PLOTLY__ &lt; \\u003c \u2028"
)
NAME = "mine <a href='https://example.com'>x</a> __DATA__"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(report, rows) of 12 prompts with 4 samples each; format_tags under a hostile name."""
    folder = tmp_path_factory.mktemp("lab")
    rows = []
    for prompt in range(12):
        for sample in range(4):
            right = sample < prompt % 5
            text = f"<think>{HOSTILE}</think><answer>{prompt if right else 77}</answer>"
            row = {"prompt": f"{HOSTILE} {prompt}", "completion": text if sample else text[:-9], "answer": str(prompt)}
            rows.append({**row, "label": int(right), "source": HOSTILE if prompt % 2 else "other"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping = {"exact_match": 1.0, NAME: {"kind": "format_tags", "weight": 0.2}}
    patch = pytest.MonkeyPatch()
    patch.setattr(probes, "PROBES", [probe for probe in probes.PROBES if probe.name in ("empty", "gold", "skeleton")])
    found = evaluate(path, mapping, folder / "out", Options(Columns(label="label"), probes=True))
    patch.undo()
    assert (folder / "out" / "report.html").is_file()
    return found.report, parquet.read_table(folder / "out" / "scores.parquet").to_pylist()


def charts(report: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {chart["title"]: chart for section in sections(report, rows) for chart in section["charts"]}


def table(report: dict[str, Any], rows: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    [found] = [t for section in sections(report, rows) for t in section["tables"] if t["title"] == title]
    return [dict(zip([column["name"] for column in found["columns"]], row, strict=True)) for row in found["rows"]]


def test_plots_hold_the_numbers_of_the_report(evaluated):
    report, rows = evaluated
    found = charts(report, rows)
    # prompts 0..11 have 0 1 2 3 4 0 1 2 3 4 0 1 right samples; the first one of each is cut, and right in 9 of them
    block = report["rewards"]["exact_match"]
    assert block["confusion"] == {"tp": 21 - 9, "fp": 0, "fn": 9, "tn": 27, "unscored": 0}
    confusion = found["Labels and verdicts: exact_match"]["traces"][0]
    assert confusion["z"] == [[9, 12], [27, 0]] and confusion["text"][0][0] == "9<br>18.8 %"
    slices = found["By slice: exact_match"]["traces"]
    assert [trace["name"] for trace in slices] == ["accuracy", "wrong accepted", "right rejected"]
    assert slices[0]["x"] == [row["accuracy"] for row in block["slices"]]
    roc = found["ROC"]["traces"]
    assert [trace.get("name", "")[:11] for trace in roc] == ["", "exact_match", "mine &lt;a hr"[:11]]
    assert list(zip(roc[1]["x"], roc[1]["y"])) == [tuple(point) for point in block["roc"]]
    histogram = {trace["name"]: sum(trace["y"]) for trace in found["Scores: exact_match"]["traces"]}
    assert histogram == {"right": 21, "wrong": 27}
    scatter = {trace["name"]: len(trace["x"]) for trace in found["Score against length: exact_match"]["traces"]}
    assert scatter == {"right": 21, "wrong": 27}
    zero = found["Groups of zero variance"]["traces"]
    assert zero[0]["y"] == [block["zero_variance_share"]["4"]] and zero[0]["x"] == ["4"]
    assert [len(found[f"Groups by pass rate: {name}"]["traces"]) for name in ("exact_match", "total")] == [2, 2]
    teach, same = (sum(trace["y"]) for trace in found["Groups by pass rate: exact_match"]["traces"])
    assert teach + same == 12 and same == round(12 * block["zero_variance_share"]["4"])
    drives = found["Which reward drives the gradient"]["traces"][0]
    assert drives["x"] == list(report["total"]["gradient_share"].values()) and sum(drives["x"]) == pytest.approx(1)
    passes = {trace["name"][:15]: trace for trace in found["pass@k and maj@k"]["traces"]}
    assert passes["pass@k by label"]["x"] == [1, 2, 4]
    assert passes["pass@k by label"]["y"] == pytest.approx([21 / 48, (0 + 3 * 1 / 2 + 2 * 5 / 6 + 2 + 2) / 12, 9 / 12])
    times = found["Time to score a sample"]["traces"][0]
    assert times["y"][-1] == 1.0 and times["x"][-1] == pytest.approx(1000 * max(r["exact_match.run_s"] for r in rows))
    kappa = found["Agreement of rewards"]["traces"][0]["z"]
    assert kappa[0][1] == kappa[1][0] == report["agreement"][0]["kappa"] and kappa[0][0] == 1.0
    assert found["Probes"]["traces"][0]["x"] == ["template", "raw_gold", "empty", "skeleton", "gold"]
    assert {trace["type"] for chart in found.values() for trace in chart["traces"] if "type" in trace} == {
        "bar",
        "heatmap",
    }


def test_tables_hold_the_numbers_of_the_report(evaluated):
    report, rows = evaluated
    glance = {row["reward"]: row for row in table(report, rows, "Rewards")}
    assert list(glance) == ["exact_match", NAME, "total"]
    assert (glance["exact_match"]["accuracy"], glance["exact_match"]["false negatives"]) == (39 / 48, 9 / 21)
    low, high = report["rewards"]["exact_match"]["ci"]["accuracy"]
    assert glance["exact_match"]["accuracy, 95 %"] == f"{low:.3g} to {high:.3g}"
    asked = table(report, rows, "Every probe")
    assert [row["result"] for row in asked] == sorted(
        [row["result"] for row in asked], key=["fail", "pass", "skipped"].index
    )
    assert {row["reward"] for row in asked} == {"exact_match", NAME, "total"}
    assert {row["check"] for row in table(report, rows, "Determinism")} >= {"order", "batch size"}
    samples = table(report, rows, "Samples")
    assert len(samples) == 48
    wrong = [row for row in samples if row["disagreement"]]
    assert samples[: len(wrong)] == wrong  # disagreements first
    cut = [row for row in wrong if "exact_match rejects" in row["disagreement"]]
    assert len(cut) == 9 and all(row["label"] == 1 and row["exact_match"] == 0 for row in cut)
    assert cut[0]["completion"] == rows[cut[0]["row"]]["completion"]
    shown = dict(tiles(report))
    assert shown["samples"] == "48" and shown["exact_match: agrees with the labels"] == "81.2 %"
    assert shown["exact_match: wrong accepted, right rejected"] == "0.0 %, 42.9 %"


def test_blocks_that_are_missing_are_left_out(evaluated, tmp_path: Path):
    report, rows = copy.deepcopy(evaluated)
    report |= {"total": None, "agreement": [], "curves": {"label": None}, "probes": None, "verdicts": []}
    report["data"]["labels"] = "none"
    del report["rewards"][NAME]
    keep = ("runs", "bounds", "weight", "grouped", "samples", "mean", "std", "binary", "distinct", "statuses", "run_ms")
    for name, block in report["rewards"].items():
        size = {"zero_variance_share": {"4": None}, "expected_zero_variance": {"4": None}, "ci": {}}
        empty = {key: None if not isinstance(value, list) else [] for key, value in block.items()}
        report["rewards"][name] = {**empty, **size, **{key: block[key] for key in keep}}
    rows = [{**row, "label": None} for row in rows]
    found = sections(report, rows)
    assert [section["title"] for section in found] == ["At a glance", "Time", "Samples"]
    write_page(report, rows, tmp_path / "report.html")
    seen, errors = drive(tmp_path / "report.html", "return document.querySelectorAll('h2').length;", tmp_path)
    assert errors == [] and seen == 4


def test_a_page_shows_a_bounded_number_of_samples(evaluated, monkeypatch):
    report, rows = evaluated
    monkeypatch.setattr(tables, "MAX_ROWS", 20)
    found = tables.samples(report, rows)
    assert len(found["rows"]) == 20 and "Here are 20" in found["note"]
    monkeypatch.setattr(tables, "MAX_CHARACTERS", 1000)
    assert 1 <= len(tables.samples(report, rows)["rows"]) < 4


def test_what_was_written_by_models_cannot_act(evaluated, tmp_path: Path):
    report, rows = evaluated
    path = tmp_path / "report.html"
    write_page(report, rows, path)
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition('<script type="application/json" id="data">')
    data, _, rest = rest.partition("</script>")
    assert "<" not in data and ">" not in data and json.loads(data)["sections"][-1]["title"] == "Samples"
    assert rest.count("<script>") >= 2 and "alert(1)" not in rest and "<img" not in head
    assert not re.findall(r"(?<!\w)__[A-Z]+__(?!\w)", head.replace("__PLOTLY__", "").replace("__DATA__", ""))
    assert "default-src 'none'" in head
    assert not re.findall(r"<(?:img|link|iframe)\b", head)


DRIVE = """
const table = title => {
  const block = [...document.querySelectorAll(".block")].find(block => block.querySelector("h3").textContent === title);
  const body = block.querySelector("tbody"), search = block.querySelector("input");
  return {
    click: name => [...block.querySelectorAll("th button")].find(button => button.textContent === name).click(),
    type: text => { search.value = text; search.dispatchEvent(new Event("input")); },
    column: name => {
      const at = [...block.querySelectorAll("th")].findIndex(cell => cell.textContent === name);
      return [...body.rows].filter(row => row.cells.length > 1).map(row => row.cells[at].textContent);
    },
    count: () => block.querySelector(".tools span").textContent,
  };
};
const samples = table("Samples"), seen = {};
seen.first = samples.column("disagreement")[0];
samples.click("row"); seen.down = samples.column("row").slice(0, 3);
samples.click("row"); seen.up = samples.column("row").slice(0, 3);
samples.type("other IMG"); seen.filtered = samples.count();
samples.type("no such words"); seen.none = samples.count();
samples.type(""); seen.completion = samples.column("completion")[1];
const probes = table("Every probe");
probes.click("probe"); seen.probes = probes.column("probe").slice(0, 3);
probes.type("skeleton"); seen.skeleton = new Set(probes.column("probe")).size;
seen.plots = document.querySelectorAll(".js-plotly-plot svg.main-svg").length > 0 &&
  [...document.querySelectorAll(".plot")].filter(plot => !plot.querySelector("svg.main-svg")).length;
seen.cards = document.querySelectorAll(".plot").length;
seen.acting = document.querySelectorAll("main img, main iframe, main a, main svg a").length;
seen.scripts = document.querySelectorAll("main script").length;
seen.wide = document.documentElement.scrollWidth - innerWidth;
seen.marks = [...document.querySelectorAll("svg text")].some(text => text.textContent.includes("mine <a href"));
return seen;
"""


@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_sorts_and_filters(evaluated, tmp_path: Path, width: int):
    report, rows = evaluated
    write_page(report, rows, tmp_path / "report.html")
    seen, errors = drive(tmp_path / "report.html", DRIVE, tmp_path, width)
    assert errors == []
    assert seen["first"].startswith("exact_match rejects")
    assert (seen["down"], seen["up"]) == (["47", "46", "45"], ["0", "1", "2"])
    assert (seen["filtered"], seen["none"]) == ("24 of 48 rows", "0 of 48 rows")
    assert seen["completion"] == rows[1]["completion"]
    assert (seen["probes"], seen["skeleton"]) == (["empty", "empty", "empty"], 1)
    assert seen["plots"] == 0 and seen["cards"] == len(charts(report, rows))
    assert seen["acting"] == seen["scripts"] == 0 and seen["marks"]
    assert seen["wide"] <= 0


def test_the_browser_reports_what_goes_wrong(evaluated, tmp_path: Path):
    """What the tests above rely on; the page's own policy stops the picture."""
    write_page(*evaluated, tmp_path / "report.html")
    script = """
    console.error("loud"); alert(1);
    setTimeout(() => { throw new Error("late"); }, 0);
    const picture = new Image(); picture.src = "https://example.com/x.png"; document.body.append(picture);
    return null;"""
    _, errors = drive(tmp_path / "report.html", script, tmp_path)
    text = "\n".join(errors)
    assert all(word in text for word in ("loud", "alert", "late", "policy: img-src")), errors
