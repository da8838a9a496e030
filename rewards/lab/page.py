"""report.html of the reward lab: verdicts in words, figures, plots and tables, in one file that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rewards.lab import charts, tables
from rewards.web_page import write_web_page

MOST_TILES = 12


def write_page(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the report (the content of report.json) and its samples (the rows of scores.parquet, with full text)."""
    template = resources.files("rewards.lab").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "__TITLE__": html.escape(f"Rewards on {Path(report['data']['path']).name}"),
        "__STATE__": html.escape(_state(report)),
        "__VERDICTS__": "".join(map(_verdict, report["verdicts"])),
        "__TILES__": "".join(
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
            for name, value in tiles(report)[:MOST_TILES]
        ),
        "__SETTINGS__": html.escape(
            json.dumps({key: report[key] for key in ("data", "settings", "versions", "seconds")}, indent=2, default=str)
        ),
    }
    write_web_page(path, template, parts, {"sections": sections(report, rows)})


def tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what it is, figure), the most important first."""
    data = report["data"]
    found = [("samples", f"{data['samples']:,}"), ("prompts", f"{data['groups']:,}")]
    for name, block in report["rewards"].items():
        if block["accuracy"] is not None:
            found.append((f"{name}: agrees with the labels", f"{100 * block['accuracy']:.1f} %"))
            wrong = [f"{100 * block[key]:.1f} %" if block[key] is not None else "\u2013" for key in ("fpr", "fnr")]
            found.append((f"{name}: wrong accepted, right rejected", ", ".join(wrong)))
        elif block["mean"] is not None:
            found.append((f"{name}: mean", f"{block['mean']:.3g}"))
        if block["auc"] is not None and not block["binary"]:
            found.append((f"{name}: AUC", f"{block['auc']:.3f}"))
        sizes = [(size, share) for size, share in block["zero_variance_share"].items() if share is not None]
        if sizes:
            found.append((f"{name}: groups of {sizes[0][0]} that teach nothing", f"{100 * sizes[0][1]:.1f} %"))
    if report["probes"]:
        failed = sum(probe["result"] == "fail" for probe in report["probes"])
        found.insert(2, ("probes failed", f"{failed} of {sum(p['result'] != 'skipped' for p in report['probes'])}"))
    return found


def sections(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Title, charts and tables of each block that has something to show."""
    every = [
        ("At a glance", [], [tables.rewards(report), tables.reasons(report)]),
        ("Against the labels", charts.against_labels(report), []),
        ("Rewards against each other", charts.agreement(report), [tables.pairs(report)]),
        ("What groups teach", charts.group_signal(report), []),
        ("The task", charts.curves(report), []),
        ("Probes", charts.probes(report), [tables.probes(report)]),
        ("Time", charts.times(report, rows), []),
        ("The same again", [], [tables.determinism(report)]),
        ("Samples", [], [tables.samples(report, rows)]),
    ]
    found = [
        {"title": title, "charts": plots, "tables": [table for table in listed if table is not None]}
        for title, plots, listed in every
    ]
    return [section for section in found if section["charts"] or section["tables"]]


def _state(report: Mapping[str, Any]) -> str:
    data = report["data"]
    size = data["group_size"]
    each = f"{size['min']}" if size["min"] == size["max"] else f"{size['min']} to {size['max']}"
    labels = {"none": "no labels", "binary": "labelled right or wrong", "graded": "with grades"}[data["labels"]]
    return (
        f"{data['samples']:,} samples of {data['groups']:,} prompts, {each} each, {labels}; "
        f"{', '.join(report['rewards'])}; {report['seconds']['total']:.1f} s."
    )


def _verdict(line: Mapping[str, Any]) -> str:
    who = f"<b>{html.escape(line['reward'])}</b> " if line["reward"] else ""
    remedy = f" <span>{html.escape(line['remedy'])}</span>" if line["remedy"] else ""
    return f'<p class="verdict {html.escape(line["level"])}">{who}{html.escape(line["text"])}.{remedy}</p>'
