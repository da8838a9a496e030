"""The tables of a lab report, as columns and rows for `sortedTable` of rewards/web_page.js."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Table = dict[str, Any]

MAX_ROWS, MAX_CHARACTERS = 3_000, 8_000_000  # of samples in a page; a browser gets slow beyond
_RESULTS = {"fail": 0, "pass": 1, "skipped": 2}


def rewards(report: Report) -> Table:
    """A row a reward (and the total) with what matters of it."""
    keys = {
        "mean": "mean",
        "accuracy": "accuracy",
        "false positives": "fpr",
        "false negatives": "fnr",
        "MCC": "mcc",
        "Youden J": "youden_j",
        "AUC": "auc",
        "AUC in groups": "auc_within_group",
        "advantage fidelity": "advantage_fidelity",
        "SNR": "snr",
    }
    blocks = dict(report["rewards"]) | ({"total": report["total"]} if report["total"] else {})
    keys = {title: key for title, key in keys.items() if any(b.get(key) is not None for b in blocks.values())}
    sizes = [
        s
        for s in ("4", "8", "16")
        if any((b.get("zero_variance_share") or {}).get(s) is not None for b in blocks.values())
    ]
    columns = [("reward", "word")]
    for title, key in keys.items():
        columns.append((title, "number"))
        if any((block.get("ci") or {}).get(key) for block in blocks.values()):
            columns.append((f"{title}, 95 %", "word"))
    columns += [(f"zero variance, G={size}", "number") for size in sizes]
    columns += [
        ("samples", "number"),
        ("failed", "number"),
        ("run p50 ms", "number"),
        ("run p99 ms", "number"),
        ("runs", "word"),
    ]
    rows = []
    for name, block in blocks.items():
        statuses = block.get("statuses") or {}
        cells: dict[str, Any] = {"reward": name, "samples": block.get("samples"), "runs": block.get("runs")}
        cells["failed"] = sum(count for status, count in statuses.items() if status not in ("ok", "not_applicable"))
        for title, key in keys.items():
            cells[title], span = block.get(key), (block.get("ci") or {}).get(key)
            cells[f"{title}, 95 %"] = None if not span else f"{span[0]:.3g} to {span[1]:.3g}"
        cells |= {f"zero variance, G={size}": (block.get("zero_variance_share") or {}).get(size) for size in sizes}
        cells |= {f"run {p} ms": (block.get("run_ms") or {}).get(p) for p in ("p50", "p99")}
        rows.append([cells.get(title) for title, _ in columns])
    return _table("Rewards", "Shares from 0 to 1; intervals by bootstrap over prompts.", columns, rows)


def reasons(report: Report) -> Table | None:
    """Why samples have no verdict."""
    columns = [("reward", "word"), ("status", "word"), ("count", "number"), ("reason", "text")]
    rows = [
        [name, row["status"], row["count"], row["reason"]]
        for name, block in report["rewards"].items()
        for row in block["reasons"] or []
    ]
    return _table("Why there is no verdict", "", columns, rows) if rows else None


def pairs(report: Report) -> Table | None:
    """Every two rewards against each other."""
    keys = (
        "a",
        "b",
        "samples",
        "both",
        "only_a",
        "only_b",
        "neither",
        "agree",
        "kappa",
        "mcnemar_p",
        "a_right",
        "b_right",
    )
    columns = [(key.replace("_", " "), "word" if key in ("a", "b") else "number") for key in keys]
    rows = [[row[key] for key in keys] for row in report["agreement"]]
    note = "Samples that both, one or none accepts. McNemar's p is small where one accepts more; a right: by the label."
    return _table("Pairs of rewards", note, columns, rows) if rows else None


def determinism(report: Report) -> Table | None:
    """What changed when the same samples were scored in another way."""
    columns = [
        ("reward", "word"),
        ("check", "word"),
        ("result", "mark"),
        ("samples", "number"),
        ("values changed", "number"),
    ]
    columns += [("statuses changed", "number"), ("largest difference", "number"), ("how", "word")]
    rows = [
        [
            *(name, row["check"], "fail" if row["flips"] or row["status_flips"] else "pass", row["samples"]),
            *(row["flips"], row["status_flips"], row["max_difference"], row["detail"]),
        ]
        for name, block in report["rewards"].items()
        for row in block["determinism"] or []
    ]
    return (
        _table("Determinism", "The same samples once more: every verdict must be the same.", columns, rows)
        if rows
        else None
    )


def probes(report: Report) -> Table | None:
    """What each reward makes of each probe, failures first."""
    columns = [("reward", "word"), ("probe", "word"), ("result", "mark"), ("mean", "number"), ("allowed", "number")]
    columns += [
        ("wrong answers get", "number"),
        ("what came of it", "text"),
        ("remedy", "text"),
        ("what it is", "text"),
    ]
    columns += [("example", "text"), ("samples", "number"), ("seconds", "number")]
    keys = (
        "reward",
        "probe",
        "result",
        "mean",
        "allowed",
        "wrong_mean",
        "text",
        "remedy",
        "what",
        "example",
        "samples",
        "seconds",
    )
    found = sorted(report["probes"] or [], key=lambda row: _RESULTS[row["result"]])
    rows = [[row.get(key) for key in keys] for row in found]
    return _table("Every probe", "Failures first.", columns, rows) if rows else None


def samples(report: Report, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The samples, those first on which a reward (the first of them before others) and the label, or two, disagree."""
    names = list(report["rewards"])
    why = [_why(report, row) for row in rows]
    firsts = [min((place for place, name in enumerate(names) if name in said), default=len(names)) for said in why]
    order = sorted(range(len(rows)), key=lambda place: (not why[place], firsts[place], place))
    shown, size = [], 0
    for place in order[:MAX_ROWS]:
        size += len(str(rows[place]["prompt"])) + len(rows[place]["completion"])
        if shown and size > MAX_CHARACTERS:
            break
        shown.append(place)
    columns = [("row", "number"), ("disagreement", "word"), ("label", "number"), *((name, "number") for name in names)]
    columns += [
        ("prompt", "text"),
        ("completion", "text"),
        ("answer", "text"),
        ("total", "number"),
        ("characters", "number"),
    ]
    columns += [("group", "word"), ("sample", "word"), ("source", "word"), ("without verdict", "text")]
    table = []
    for place in shown:
        row = rows[place]
        failed = [
            f"{name}: {row[f'{name}.status']} {row[f'{name}.reason'] or ''}".strip()
            for name in names
            if row[f"{name}.status"] != "ok"
        ]
        cells = [
            row["row"],
            ", ".join(f"{name} {how}".strip() for name, how in why[place].items()),
            row["label"],
            *(row[f"{name}.value"] for name in names),
        ]
        cells += [row["prompt"], row["completion"], row["answer"] or "", row["total"], row["length"]]
        table.append([*cells, row["group"], str(row["sample"]), row["source"], "; ".join(failed)])
    disagreements = sum(map(bool, why))
    note = f"{disagreements:,} of {len(rows):,} samples disagree and come first. "
    note += "Click a header to sort, a long text to open it."
    if len(shown) < len(rows):
        note += f" Here are {len(shown):,}; scores.parquet and disagreements.jsonl have all."
    return _table("Samples", note, columns, table)


def _why(report: Report, row: Mapping[str, Any]) -> dict[str, str]:
    """Reward -> how its verdict and the label disagree; without a label, "rewards" -> "differ"."""
    accepted, found = {}, {}
    right = row["label"] >= 0.5 if row["label"] is not None and report["data"]["labels"] == "binary" else None
    for name, block in report["rewards"].items():
        value, cut = row[f"{name}.value"], block["threshold"]
        if value is None:
            if right is not None and row[f"{name}.status"] != "not_applicable":
                found[name] = "has no verdict"
        elif cut is not None or block["binary"]:
            accepted[name] = value >= (1 if cut is None else cut)
            if right is not None and accepted[name] != right:
                found[name] = "accepts" if accepted[name] else "rejects"
    return {"rewards": "differ"} if right is None and len(set(accepted.values())) > 1 else found


def _table(title: str, note: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Any]]) -> Table:
    plain = [[None if isinstance(v, float) and not math.isfinite(v) else v for v in row] for row in rows]
    return {"title": title, "note": note, "columns": [{"name": n, "kind": k} for n, k in columns], "rows": plain}
