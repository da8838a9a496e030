"""The plots of a lab report: its numbers as Plotly traces, each with a title and a line that says how to read it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

COLOURS = ("#2457c5", "#d2691e", "#1b8a5a", "#8b3fa8", "#b3261e", "#5d6878", "#b8860b", "#008b8b")
RIGHT, WRONG, NEITHER = "#1b8a5a", "#b3261e", "#5d6878"
_CALM = [[0, "#f4f6f8"], [1, "#2457c5"]]
_SHARE = {"range": [0, 1.02]}
_DIAGONAL = {
    "x": [0, 1], "y": [0, 1], "mode": "lines", "line": {"color": "#b9c2ce", "dash": "dot", "width": 1},
    "showlegend": False, "hoverinfo": "skip",
}  # fmt: skip

Report = Mapping[str, Any]
Chart = dict[str, Any]


def label(text: object, length: int = 40) -> str:
    """Text for a plot, which reads `<b>`, `<a>` and entities as HTML."""
    plain = str(text)
    return html.escape(plain if len(plain) <= length else plain[: length - 1] + "\u2026", quote=False)


def against_labels(report: Report) -> list[Chart]:
    """Confusion matrices, slices, ROC, reliability, histograms, score against length, best of n."""
    names = list(report["rewards"])
    found = []
    for name in names:
        block = report["rewards"][name]
        if block["confusion"]:
            found.append(_confusion(name, block))
    found += [_slices(name, report["rewards"][name]["slices"]) for name in names if report["rewards"][name]["slices"]]
    roc = [_line(name, i, *_columns(report["rewards"][name]["roc"])) for i, name in enumerate(names)]
    if any(trace["x"] for trace in roc):
        note = "The higher above the diagonal, the better right answers stand out."
        axes = {"xaxis": _titled("wrong answers accepted"), "yaxis": _titled("right answers accepted") | _SHARE}
        found.append(_chart("ROC", note, [_DIAGONAL, *(t for t in roc if t["x"])], axes))
    found += [chart for name in names if (chart := _reliability(name, report["rewards"][name]))]
    for name in names:
        block = report["rewards"][name]
        if chart := _histogram(name, block["histogram"]):
            found.append(chart)
        if block["length_scatter"]:
            found.append(_scatter(name, block))
        if block["best_of_n"]:
            found.append(_best_of_n(name, block["best_of_n"]))
    return found


def agreement(report: Report) -> list[Chart]:
    """Cohen's kappa of every pair of rewards."""
    names, pairs = list(report["rewards"]), report["agreement"]
    if not any(pair["kappa"] is not None for pair in pairs):
        return []
    kappa = {frozenset((pair["a"], pair["b"])): pair["kappa"] for pair in pairs}
    grid = [[1.0 if a == b else kappa.get(frozenset((a, b))) for b in names] for a in names]
    ticks = [label(name, 24) for name in names]
    trace = _heat(ticks, ticks, grid, -1, 1, [[0, WRONG], [0.5, "#f4f6f8"], [1, "#2457c5"]], "%{z:.2f}")
    note = "Cohen's kappa: 1 is the same verdicts, 0 what chance gives."
    return [_chart("Agreement of rewards", note, [trace], _grid_axes())]


def group_signal(report: Report) -> list[Chart]:
    """What a group of samples teaches: groups without variance, by pass rate too, and which part drives the rest."""
    found = []
    subjects = dict(report["rewards"]) | ({"total": report["total"]} if report["total"] else {})
    lines = []
    for i, (name, block) in enumerate(subjects.items()):
        for key, dash in (("zero_variance_share", "solid"), ("expected_zero_variance", "dot")):
            points = [(size, share) for size, share in (block.get(key) or {}).items() if share is not None]
            if points:
                lines.append(_line(name, i, *_columns(points), dash=dash) | {"showlegend": dash == "solid"})
    if lines:
        note = "Groups in which all samples score the same teach nothing. Dotted: expected of the pass rates."
        axes = {"xaxis": _titled("samples a prompt") | {"type": "category"}, "yaxis": _titled("share") | _SHARE}
        found.append(_chart("Groups of zero variance", note, lines, axes))
    for name, block in subjects.items():
        bins = [b for b in block.get("pass_rate_bins") or [] if b["groups"]]
        if bins:
            x = [f"{100 * b['from']:.0f} to {100 * b['to']:.0f} %" for b in bins]
            same = [b["zero_variance"] for b in bins]
            rest = [b["groups"] - b["zero_variance"] for b in bins]
            traces = [_bar("teach", x, rest, RIGHT), _bar("zero variance", x, same, "#b9c2ce")]
            axes = {"barmode": "stack", "xaxis": {"type": "category"}, "yaxis": _titled("groups")}
            found.append(_chart(f"Groups by pass rate: {name}", "How many of them teach.", traces, axes))
    shares = {k: v for k, v in ((report["total"] or {}).get("gradient_share") or {}).items() if v is not None}
    if shares:
        bars = {**_bar("", [*shares.values()], [label(name) for name in shares], COLOURS[0]), "orientation": "h"}
        axes = {"xaxis": _titled("share of the variance within groups"), "yaxis": {"type": "category"}}
        note = "A part of much weight and little variance drives nothing; below 0, it works against the rest."
        found.append(_chart("Which reward drives the gradient", note, [bars], axes))
    return found


def curves(report: Report) -> list[Chart]:
    """pass@k and maj@k by the labels and by each reward."""
    lines = []
    for i, (name, curve) in enumerate(report["curves"].items()):
        for key, dash in (("pass_at_k", "solid"), ("maj_at_k", "dash")):
            points = [(p["k"], p["value"]) for p in (curve or {}).get(key, []) if p["value"] is not None]
            if points:
                lines.append(_line(f"{key.split('_')[0]}@k by {name}", i, *_columns(points), dash=dash))
    if not lines:
        return []
    axes = {
        "xaxis": _titled("k samples") | _powers([k for line in lines for k in line["x"]]),
        "yaxis": _titled("share of prompts") | _SHARE,
    }
    return [_chart("pass@k and maj@k", "Any of k samples right; the most frequent answer right.", lines, axes)]


def times(report: Report, rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Run and queue times of a sample, as cumulative shares."""
    found = []
    for key, title in (("run_s", "Time to score a sample"), ("queue_s", "Time a sample waits for a worker")):
        lines = []
        for i, name in enumerate(report["rewards"]):
            values = [1000 * row[f"{name}.{key}"] for row in rows if row.get(f"{name}.{key}")]
            if values:
                shares = np.linspace(0.005, 1, 200)
                lines.append(_line(name, i, np.quantile(values, shares).tolist(), shares.tolist()))
        if lines:
            axes = {"xaxis": _titled("milliseconds") | {"type": "log"}, "yaxis": _titled("share of samples") | _SHARE}
            found.append(_chart(title, "Share that took at most so long; logarithmic.", lines, axes))
    return found


def probes(report: Report) -> list[Chart]:
    """Which probe each reward passes."""
    rows = report["probes"] or []
    if not rows:
        return []
    what = {"pass": 1, "skipped": 0, "fail": -1}
    names, asked = (list(dict.fromkeys(row[key] for row in rows)) for key in ("reward", "probe"))
    results = {(row["reward"], row["probe"]): what[row["result"]] for row in rows}
    grid = [[results.get((name, probe)) for probe in asked] for name in names]
    scale = [[0, WRONG], [0.33, WRONG], [0.33, "#e4e8ed"], [0.67, "#e4e8ed"], [0.67, RIGHT], [1, RIGHT]]
    trace = _heat(asked, [label(name, 24) for name in names], grid, -1, 1, scale, None)
    trace |= {"xgap": 2, "ygap": 2, "hovertemplate": "%{y}, %{x}<extra></extra>"}
    layout = {"xaxis": {"type": "category", "tickangle": -60, "dtick": 1}, "yaxis": {"type": "category"}}
    return [_chart("Probes", "Green passes, red fails, grey does not apply.", [trace], layout) | {"wide": True}]


def _confusion(name: str, block: Report) -> Chart:
    counts = block["confusion"]
    grid = [[counts["fn"], counts["tp"]], [counts["tn"], counts["fp"]]]
    total = max(1, sum(map(sum, grid)))
    trace = _heat(["rejected", "accepted"], ["right", "wrong"], grid, 0, total, _CALM, "%{text}")
    trace["text"] = [[f"{count:,}<br>{100 * count / total:.1f} %" for count in row] for row in grid]
    at = "" if block["threshold"] is None else f"Accepted is {block['threshold']:.4g} and more"
    at += {"best": ", the best threshold on these very data.", None: ""}.get(block["threshold_from"], ".")
    unscored = f" {counts['unscored']:,} have no verdict." if counts["unscored"] else ""
    return _chart(f"Labels and verdicts: {name}", at + unscored, [trace], _grid_axes("label"))


def _slices(name: str, slices: Sequence[Report]) -> Chart:
    x = [f"{label(row['slice'], 28)} ({row['samples']:,})" for row in slices]
    kinds = (
        ("accuracy", "accuracy", COLOURS[0]),
        ("fpr", "wrong accepted", WRONG),
        ("fnr", "right rejected", COLOURS[1]),
    )
    traces = []
    for key, text, colour in kinds:
        if any(row[key] is not None for row in slices):
            bar = {**_bar(text, [row[key] for row in slices], x, colour), "orientation": "h"}
            spans = [(row.get("ci") or {}).get(key) for row in slices]
            if any(spans):
                ends = [
                    [
                        abs(row[key] - span[side]) if span and row[key] is not None else 0
                        for row, span in zip(slices, spans)
                    ]
                    for side in (1, 0)
                ]
                error = {"type": "data", "symmetric": False, "array": ends[0], "arrayminus": ends[1]}
                bar["error_x"] = error | {"thickness": 1, "color": "#1c2430"}
            traces.append(bar)
    layout = {"xaxis": _titled("share") | _SHARE, "yaxis": {"type": "category", "autorange": "reversed"}}
    chart = _chart(f"By slice: {name}", "By source, length and form, with 95 % intervals.", traces, layout)
    return chart | {"height": max(270, 90 + 42 * len(slices))}


def _reliability(name: str, block: Report) -> Chart | None:
    points = block["reliability"]
    if not points or block["binary"]:
        return None
    x, y = ([point[key] for point in points] for key in ("predicted", "observed"))
    size = np.sqrt([point["count"] for point in points])
    marks = {"color": COLOURS[0], "size": (6 + 20 * size / size.max()).tolist()}
    trace = {"x": x, "y": y, "mode": "lines+markers", "marker": marks, "showlegend": False}
    axes = {"xaxis": _titled("share right, as predicted") | _SHARE, "yaxis": _titled("share right, observed") | _SHARE}
    note = "On the diagonal, scores can be read as chances of being right."
    return _chart(f"Reliability: {name}", note, [_DIAGONAL, trace], axes)


def _histogram(name: str, histogram: Report | None) -> Chart | None:
    edges = (histogram or {}).get("edges") or []
    if histogram is None or len(edges) < 2:
        return None
    x = [(low + high) / 2 for low, high in pairwise(edges)]
    width = [high - low for low, high in pairwise(edges)]
    kinds = (("right", RIGHT), ("wrong", WRONG), ("unlabelled", NEITHER))
    traces = [_bar(key, x, histogram[key], colour) | {"width": width} for key, colour in kinds if any(histogram[key])]
    layout = {"barmode": "stack", "bargap": 0, "xaxis": _titled("score"), "yaxis": _titled("samples")}
    return _chart(f"Scores: {name}", "By label." if len(traces) > 1 else "", traces, layout) if traces else None


def _scatter(name: str, block: Report) -> Chart:
    kinds = {"right": RIGHT, "wrong": WRONG, "unlabelled": NEITHER}
    points: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for length, value, mark in block["length_scatter"]:
        points["unlabelled" if mark is None else "right" if mark >= 0.5 else "wrong"].append((length, value))
    traces = [
        dict(
            zip("xy", _columns(points[kind])),
            name=kind,
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.5},
        )
        for kind, colour in kinds.items()
        if points[kind]
    ]
    rho = block["spearman_length"]
    note = "" if rho is None else f"Rank correlation {rho:+.2f}."
    axes = {"xaxis": _titled("characters"), "yaxis": _titled("score")}
    return _chart(f"Score against length: {name}", note, traces, axes)


def _best_of_n(name: str, points: Sequence[Report]) -> Chart:
    keys = (("oracle", 2), ("reward", 0), ("random", 5))
    lines = [_line(key, i, [p["n"] for p in points], [p[key] for p in points]) for key, i in keys]
    axes = {
        "xaxis": _titled("n samples") | _powers([p["n"] for p in points]),
        "yaxis": _titled("mean label of the pick"),
    }
    return _chart(f"Best of n: {name}", "What the reward picks, beside the best and a blind pick.", lines, axes)


def _chart(title: str, note: str, traces: Sequence[Report], layout: Report) -> Chart:
    return {"title": title, "note": note, "traces": list(traces), "layout": dict(layout)}


def _line(name: str, colour: int, x: Any, y: Any, dash: str = "solid") -> dict[str, Any]:
    tint = COLOURS[colour % len(COLOURS)]
    mode = "lines+markers" if len(x) < 40 else "lines"
    look = {"line": {"color": tint, "width": 2, "dash": dash}, "marker": {"color": tint, "size": 5}}
    return {
        "name": label(name),
        "x": list(x),
        "y": list(y),
        "mode": mode,
        "showlegend": True,
        **look,
    }


def _bar(name: str, x: Any, y: Any, colour: str) -> dict[str, Any]:
    return {"type": "bar", "name": name, "x": list(x), "y": list(y), "marker": {"color": colour}}


def _heat(x: Any, y: Any, z: Any, low: float, high: float, scale: Any, text: str | None) -> dict[str, Any]:
    shown = {} if text is None else {"texttemplate": text}
    look = {"zmin": low, "zmax": high, "colorscale": scale, "showscale": False, "hoverinfo": "none"}
    return {"type": "heatmap", "x": list(x), "y": list(y), "z": z, **look, **shown}


def _grid_axes(title: str = "") -> dict[str, Any]:
    return {"xaxis": {"type": "category"}, "yaxis": _titled(title) | {"type": "category", "autorange": "reversed"}}


def _powers(values: Sequence[int]) -> dict[str, Any]:
    return {"type": "log", "tickvals": sorted(set(values)), "ticktext": [str(value) for value in sorted(set(values))]}


def _titled(text: str) -> dict[str, Any]:
    return {"title": {"text": text, "standoff": 4}}


def _columns(points: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Any]]:
    return [point[0] for point in points], [point[1] for point in points]
