"""report.json put together from data, scores and statistics, and the row-level files beside it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rewards.compose import Rewards
from rewards.lab import blocks, bootstrap, classification, group_signal
from rewards.lab.answers import final_answer
from rewards.lab.data import LabData
from rewards.lab.running import Scored
from rewards.records import Score

SCHEMA = 1
STEP = 512  # samples of a training step, for the projected seconds
PACKAGES = (
    "grpo-v3",
    "numpy",
    "math-verify",
    "latex2sympy2_extended",
    "sympy",
    "antlr4-python3-runtime",
    "transformers",
)
FILES = ("report.json", "report.html", "scores.parquet", "disagreements.jsonl")


def known_samples(data: LabData) -> tuple[blocks.Samples, list[tuple[str, str | None]]]:
    """What the statistics need to know of the samples, and each sample's (form, final answer)."""
    labels = np.array([np.nan if label is None else label for label in data.labels], dtype=np.float64)
    known = labels[np.isfinite(labels)]
    on_scale = len(known) > 0 and known.min() >= 0 and known.max() <= 1
    length = np.array([len(sample.completion) for sample in data.inputs])
    names: dict[str, int] = {}
    group = np.array([names.setdefault(sample.group, len(names)) for sample in data.inputs])
    answers = [final_answer(sample.completion) for sample in data.inputs]
    slices: dict[str, Sequence[str | None]] = {}
    sources = data.sources if data.columns["source"] else data.names
    if 1 < len(set(sources)) <= 20:
        slices["source"] = sources
    cuts = np.unique(np.quantile(length, [0.25, 0.5, 0.75]).astype(int))
    ranges = [f"up to {cuts[0]}", *(f"{low + 1} to {high}" for low, high in pairwise(cuts)), f"over {cuts[-1]}"]
    slices["length"] = [f"{ranges[place]} characters" for place in np.searchsorted(cuts, length, "left")]
    slices["format"] = [form for form, _ in answers]
    right = labels >= 0.5 if on_scale else None
    weights = bootstrap.draw_weights(len(names))
    return blocks.Samples(group, labels, right, length, slices, weights), answers


def assemble(
    data: LabData,
    rewards: Rewards,
    scored: Mapping[str, Scored],
    totals: Sequence[Score],
    determinism: Mapping[str, list[dict[str, Any]]],
    probes: list[dict[str, Any]] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The report but for its verdicts and seconds. Its structure is versioned by SCHEMA; null: cannot be said."""
    samples, answers = known_samples(data)
    values = {name: column.values() for name, column in scored.items()}
    found = {}
    for name, part in rewards.parts.items():
        mine = [probe for probe in probes or [] if probe["reward"] == name]
        found[name] = {
            "runs": part.rule.runs,
            "needs": sorted(part.rule.needs),
            "bounds": list(part.rule.bounds) if part.rule.bounds and np.isfinite(part.rule.bounds).all() else None,
            "weight": part.weight,
            "grouped": part.rule.grouped,
            **blocks.block(samples, values[name], part.rule.bounds),
            **blocks.operation(scored[name].scores, scored[name].seconds, STEP),
            "determinism": determinism.get(name),
            "flips": sum(row["flips"] + row["status_flips"] for row in determinism.get(name, [])),
            "probes_failed": None if probes is None else sum(probe["result"] == "fail" for probe in mine),
        }
    thresholds = {name: entry["threshold"] for name, entry in found.items()}
    final = [answer for _, answer in answers]
    curves = {
        name: _curves(samples, values[name] >= threshold, np.isfinite(values[name]), final)
        for name, threshold in thresholds.items()
        if threshold is not None
    }
    if samples.right is not None:
        curves["label"] = _curves(samples, samples.right, np.isfinite(samples.labels), final)
    return {
        "schema": SCHEMA,
        "tool": "grpo rewards evaluate",
        "data": _data(data, samples),
        "settings": {**settings, "bootstrap": len(samples.weights), "confidence": 0.95, "samples_per_step": STEP},
        "versions": _versions(),
        "rewards": found,
        "total": _total(samples, rewards, totals, scored) if len(rewards.parts) > 1 else None,
        "agreement": agreement(values, thresholds, samples),
        "curves": {"label": None, **curves},
        "probes": probes,
    }


def agreement(
    values: Mapping[str, np.ndarray], thresholds: Mapping[str, float | None], samples: blocks.Samples
) -> list[dict[str, Any]]:
    """A row for each two rewards that accept or reject: who accepts what, Cohen's kappa, McNemar's test."""
    names = [name for name, threshold in thresholds.items() if threshold is not None]
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            use = np.isfinite(values[a]) & np.isfinite(values[b])
            if not use.any():
                continue
            yes_a, yes_b = values[a][use] >= thresholds[a], values[b][use] >= thresholds[b]
            both, only_a, only_b, neither = classification.outcomes(yes_a, yes_b).sum(0).astype(int).tolist()
            differ = (yes_a != yes_b) & np.isfinite(samples.labels[use])
            right = None if samples.right is None else samples.right[use]
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "samples": int(use.sum()),
                    "both": both,
                    "only_a": only_a,
                    "only_b": only_b,
                    "neither": neither,
                    "agree": (both + neither) / int(use.sum()),
                    "kappa": blocks.number(classification.kappa(both, only_a, only_b, neither)),
                    "mcnemar_p": classification.mcnemar(only_a, only_b),
                    "a_right": None if right is None else int((differ & (yes_a == right)).sum()),
                    "b_right": None if right is None else int((differ & (yes_b == right)).sum()),
                }
            )
    return rows


def sample_rows(data: LabData, scored: Mapping[str, Scored], totals: Sequence[Score]) -> list[dict[str, Any]]:
    """A flat row for each sample: what scores.parquet holds and the page shows."""
    rows, seen = [], dict[str, int]()
    for place, sample in enumerate(data.inputs):
        number = seen[sample.group] = seen.get(sample.group, -1) + 1
        answer = sample.fields.get("answer")
        row: dict[str, Any] = {
            "row": place,
            "where": data.where[place],
            "group": sample.group,
            "sample": data.names[place] or str(number),
            "prompt": sample.prompt if isinstance(sample.prompt, str) else _json(sample.prompt),
            "completion": sample.completion,
            "answer": answer if answer is None or isinstance(answer, str) else _json(answer),
            "label": data.labels[place],
            "source": data.sources[place],
            "length": len(sample.completion),
            "total": totals[place].value,
            "total.status": str(totals[place].status),
        }
        for name, column in scored.items():
            score = column.scores[place]
            row[f"{name}.value"], row[f"{name}.status"] = score.value, str(score.status)
            row[f"{name}.reason"] = str(score.info.get("reason", ""))
            row[f"{name}.term"] = totals[place].terms.get(name)
            row[f"{name}.run_s"], row[f"{name}.queue_s"] = score.run_s, score.queue_s
        rows.append(row)
    return rows


def disagreements(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to read first: where a reward and the label disagree, a labelled sample has no score, or rewards differ."""
    names = list(report["rewards"])
    thresholds = {name: report["rewards"][name]["threshold"] for name in names}
    labelled = any(report["rewards"][name]["confusion"] for name in names)
    found = []
    for row in rows:
        verdicts = {
            name: row[f"{name}.value"] >= thresholds[name]
            for name in names
            if thresholds[name] is not None and row[f"{name}.value"] is not None
        }
        kinds: list[tuple[str, str | None]] = []
        if labelled and row["label"] is not None:
            right = row["label"] >= 0.5
            kinds += [
                ("false_positive" if accepted else "false_negative", name)
                for name, accepted in verdicts.items()
                if accepted != right
            ]
            kinds += [("unscored", name) for name in names if row[f"{name}.value"] is None]
        if len(set(verdicts.values())) > 1 and not kinds:
            kinds.append(("rewards_differ", None))
        for kind, name in kinds:
            found.append(
                {key: row[key] for key in ("row", "where", "group", "sample")}
                | {"kind": kind, "reward": name, "label": row["label"]}
                | {
                    f"{what}s" if what != "status" else "statuses": {other: row[f"{other}.{what}"] for other in names}
                    for what in ("value", "status", "reason")
                }
                | {key: row[key] for key in ("prompt", "completion", "answer")}
            )
    return found


def write(out: Path, report: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """report.json, scores.parquet and disagreements.jsonl in the directory."""
    import pyarrow
    import pyarrow.parquet

    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8", errors="replace")
    kinds = {"row": pyarrow.int64(), "length": pyarrow.int64(), "label": pyarrow.float64(), "total": pyarrow.float64()}
    numbers = (".value", ".term", ".run_s", ".queue_s")
    columns = {}
    for key in rows[0]:
        kind = kinds.get(key, pyarrow.float64() if key.endswith(numbers) else pyarrow.string())
        cells = [row[key] for row in rows]
        if kind == pyarrow.string():  # a lone surrogate has no UTF-8 form
            cells = [cell.encode("utf-8", "replace").decode() if isinstance(cell, str) else cell for cell in cells]
        columns[key] = pyarrow.array(cells, kind)
    pyarrow.parquet.write_table(pyarrow.table(columns), out / "scores.parquet")
    with (out / "disagreements.jsonl").open("w", encoding="utf-8", errors="replace") as lines:
        for row in disagreements(rows, report):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _data(data: LabData, samples: blocks.Samples) -> dict[str, Any]:
    known = samples.labels[np.isfinite(samples.labels)]
    sizes = np.bincount(samples.group)
    return {
        "path": data.path,
        "rows": data.rows,
        "samples": len(data.inputs),
        "groups": samples.groups,
        "group_size": {"min": int(sizes.min()), "median": float(np.median(sizes)), "max": int(sizes.max())},
        "columns": dict(data.columns),
        "shape": data.shape,
        "labels": "none" if not len(known) else "binary" if set(np.unique(known)) <= {0.0, 1.0} else "graded",
        "labelled": len(known),
        "label_mean": float(known.mean()) if len(known) else None,
    }


def _total(
    samples: blocks.Samples, rewards: Rewards, totals: Sequence[Score], scored: Mapping[str, Scored]
) -> dict[str, Any]:
    values = np.array([np.nan if score.value is None else score.value for score in totals])
    known = np.isfinite(values)
    terms = {
        name: np.array([weight * (score.terms.get(name) or 0.0) for score in totals])[known]
        for name, weight in rewards.weights.items()
        if weight
    }
    shares = group_signal.gradient_shares(terms, values[known], samples.group[known], samples.groups)
    return {
        "runs": "inline",
        "needs": [],
        "bounds": None,
        "weight": 1.0,
        "grouped": False,
        **blocks.block(samples, values, None),
        **blocks.operation(totals, sum(column.seconds for column in scored.values()), STEP),
        "determinism": None,
        "flips": None,
        "probes_failed": None,
        "gradient_share": {name: blocks.number(share) for name, share in shares.items()},
    }


def _curves(
    samples: blocks.Samples, right: np.ndarray, known: np.ndarray, answers: Sequence[str | None]
) -> dict[str, Any] | None:
    """Over the samples that are known to be right or wrong; the other ones leave their prompt."""
    if not known.any():
        return None
    names, group = np.unique(samples.group[known], return_inverse=True)
    kept = [answer for answer, use in zip(answers, known) if use]
    weights = bootstrap.draw_weights(len(names))
    return blocks.curves(group, len(names), right[known].astype(float), kept, weights)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
