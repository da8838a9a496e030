"""The report of a run: one HTML file with curves, samples and configuration that opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rewards.web_page import write_web_page

from .alarms import raised
from .log import load_metrics, load_samples

MAX_SAMPLE_CHARACTERS = 10_000_000  # of prompts and completions in a report; a browser gets slow beyond
SMOOTH_FROM = 60  # points from which a noisy curve gets a moving average


class Chart(NamedTuple):
    title: str
    metrics: tuple[str, ...]  # a `*` stands for any name
    note: str = ""
    noisy: bool = False
    zero: bool = False  # the axis starts at 0
    log: bool = False
    stacked: bool = False


CHARTS = (
    Chart("Accuracy", ("eval/accuracy",), "Greedy, on held-out prompts.", zero=True),
    Chart("Reward", ("reward",), "Mean over the samples of a step.", noisy=True),
    Chart("Accepted", ("acceptance_rate",), "Share of a step's answers that distill.threshold lets pass.", True, True),
    Chart("Rewards by name", ("rewards/*/mean",), "Unweighted means.", noisy=True),
    Chart(
        "Reward spread", ("reward_std", "frac_reward_zero_std"), "Groups of equal rewards teach nothing.", True, True
    ),
    Chart("Completion length", ("completions/mean_length",), "Tokens.", noisy=True, zero=True),
    Chart("Truncated completions", ("completions/clipped_ratio",), "Share cut at the length limit.", True, True),
    Chart("Entropy", ("entropy",), "Of the policy, nats a token. Near 0, exploration has ended.", True, True),
    Chart("KL to the reference", ("kl",), "Nats a token.", noisy=True, zero=True),
    Chart("Clipped ratios", ("clip_ratio/region_mean",), "Share of tokens outside the trust region.", True, True),
    Chart(
        "Rollout against learner",
        ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
        "Difference of log-probabilities of sampled tokens. A jump means that the two no longer run the same weights.",
        log=True,
    ),
    Chart("Expert load", ("router/max_violation",), "The busiest expert's tokens over the mean, less 1.", True, True),
    Chart("Experts", ("router/dead_experts", "router/drift"), "Shares: without tokens; of moved choices.", True, True),
    Chart("Multi-token prediction", ("mtp/agreement",), "Share of tokens where both heads agree.", noisy=True),
    Chart("Multi-token prediction loss", ("mtp_loss",), "Nats a token.", noisy=True),
    Chart(
        "Time by stage",
        ("time/rollout", "time/rewards", "time/learner", "time/sync"),
        "Seconds a step.",
        zero=True,
        stacked=True,
    ),
    Chart("Loss", ("loss",), noisy=True),
    Chart("Gradient norm", ("grad_norm",), "Before clipping.", noisy=True, zero=True),
    Chart("Learning rate", ("learning_rate",), zero=True),
)


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html into the run directory, whatever the run has recorded so far, and returns its path.

    Raises ValueError where the directory does not exist or metrics.jsonl or samples.jsonl is damaged.
    """
    directory = Path(run_dir)
    metrics, samples = load_metrics(directory), load_samples(directory)
    config_file = directory / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    config = _parsed(config_text)
    provenance = directory / "provenance.json"  # of `grpo distill`
    made = json.loads(provenance.read_text(encoding="utf-8")) if provenance.is_file() else {}
    columns, rows, note = sample_table(samples)
    charts = [data for chart in CHARTS if (data := _chart(chart, metrics))]
    page = resources.files("grpo").joinpath("report_page.html").read_text(encoding="utf-8")
    parts = {
        "__TITLE__": html.escape(str(config.get("run", {}).get("name") or directory.resolve().name)),
        "__STATE__": html.escape(_state(metrics, made.get("steps", config.get("grpo", {}).get("max_steps")))),
        "__ALARMS__": "".join(f'<p class="alarm">{html.escape(line)}</p>' for line in _alarms(metrics, config)),
        "__TILES__": "".join(
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
            for label, value in [*_chosen(made.get("selection")), *_outcome(metrics)]
        ),
        "__NOTE__": html.escape(note),
        "__CONFIG__": html.escape(config_text or "no config.yaml in the run directory"),
    }
    report = directory / "report.html"
    write_web_page(report, page, parts, {"charts": charts, "columns": columns, "samples": rows})
    return report


def sample_table(samples: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], list[list[Any]], str]:
    """Columns, rows and a note. Where a page cannot hold all text, it has every n-th recorded step, and the last."""
    names = list(dict.fromkeys(name for sample in samples for name in sample.get("scores") or {}))
    columns = [
        {"name": "step", "kind": "number"},
        {"name": "prompt", "kind": "text"},
        {"name": "completion", "kind": "text"},
        *({"name": name, "kind": "number"} for name in names),
        {"name": "reward", "kind": "number"},
        {"name": "advantage", "kind": "signed"},
        {"name": "version", "kind": "number"},
        {"name": "length", "kind": "number"},
        {"name": "finish", "kind": "word"},
        {"name": "status", "kind": "word"},
        {"name": "prompt id", "kind": "word"},
        {"name": "sample", "kind": "number"},
    ]
    size = sum(len(_text(sample.get(key))) for sample in samples for key in ("prompt", "completion"))
    steps, every = list(dict.fromkeys(sample["step"] for sample in samples)), 1 + size // MAX_SAMPLE_CHARACTERS
    shown = {*steps[::every], *steps[-1:]}
    rows = []
    for sample in samples:
        if sample["step"] in shown:
            scores = sample.get("scores") or {}
            rows.append(
                [
                    sample["step"],
                    _text(sample.get("prompt")),
                    _text(sample.get("completion")),
                    *(scores.get(name) for name in names),
                    *(sample.get(key) for key in ("reward", "advantage", "policy_version", "length")),
                    *(sample.get(key) for key in ("finish_reason", "status", "prompt_id", "sample")),
                ]
            )
    note = "Click a header to sort, a long text to open it."
    if every > 1:
        note += f" Samples of {len(shown)} of {len(steps)} recorded steps; samples.jsonl has all."
    return columns, rows, note if samples else ""


def _chart(chart: Chart, metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    lines = []
    for pattern in chart.metrics:
        before, star, after = pattern.partition("*")
        names = [pattern]
        if star:
            names = list(dict.fromkeys(n for row in metrics for n in row if n.startswith(before) and n.endswith(after)))
        for name in names:
            points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
            if points:
                x, y = [step for step, _ in points], [value for _, value in points]
                label = name.removeprefix(before).removesuffix(after) if star else name.rsplit("/", 1)[-1]
                smooth = _moving_average(y) if chart.noisy and len(y) >= SMOOTH_FROM else None
                lines.append({"name": label, "x": x, "y": y, "smooth": smooth})
    if not lines:
        return None
    log = chart.log and any(value > 0 for line in lines for value in line["y"])
    return {
        "title": chart.title,
        "note": chart.note,
        "lines": lines,
        "log": log,
        "zero": chart.zero and all(value >= 0 for line in lines for value in line["y"]),
        "stacked": chart.stacked,
    }


def _moving_average(values: list[float]) -> list[float]:
    """Centred; the window is cut at both ends."""
    reach = max(len(values) // 40, 2)
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _outcome(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(label, value) of the tiles at the top."""
    tiles = []
    for label, name in (("accuracy", "eval/accuracy"), ("reward", "reward")):
        values = [row[name] for row in metrics if row.get(name) is not None]
        if values:
            tiles.append((f"{label}, first to last", f"{values[0]:.3f} \N{RIGHTWARDS ARROW} {values[-1]:.3f}"))
    if metrics:
        tiles.append(("steps", str(metrics[-1]["step"])))
    times = [row["step_time"] for row in metrics if row.get("step_time") is not None]
    if times:
        tiles += [
            ("time of all steps", _duration(sum(times))),
            ("a step, median", _duration(sorted(times)[len(times) // 2])),
        ]
    gaps = [v for row in metrics if (v := row.get("sampling/sampling_logp_difference/max")) is not None]
    if gaps:
        tiles.append(("largest rollout-learner gap", f"{max(gaps):.2g}"))
    return tiles


def _chosen(selection: dict[str, Any] | None) -> list[tuple[str, str]]:
    """(label, value) of the tiles about what `grpo distill` kept."""
    if selection is None:
        return []
    length = selection["mean_length"]
    return [
        ("answers accepted", f"{selection['accepted']:,} of {selection['sampled']:,}"),
        ("rows kept", f"{selection['kept']:,}"),
        ("mean length, accepted to kept", f"{length['accepted']:.2f} \N{RIGHTWARDS ARROW} {length['kept']:.2f}"),
        *(
            (f"dropped: {name}".replace("_", " "), f"{count:,}")
            for name, count in selection["dropped"].items()
            if count
        ),
    ]


def _state(metrics: Sequence[dict[str, Any]], total: int | None) -> str:
    if not metrics:
        return "No step is recorded yet."
    step = metrics[-1]["step"]
    if total is None:
        return f"{step} steps recorded."
    return f"Finished: {step} steps." if step >= total else f"Not finished: step {step} of {total}."


def _alarms(metrics: Sequence[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    thresholds = config.get("run", {}).get("alarms")
    return raised(metrics, thresholds) if isinstance(thresholds, dict) else []


def _parsed(text: str) -> dict[str, Any]:
    """The sections of config.yaml; a report is written without them too."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return {k: v for k, v in content.items() if isinstance(v, dict)} if isinstance(content, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = divmod(round(seconds / 60), 60)[::-1]
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
