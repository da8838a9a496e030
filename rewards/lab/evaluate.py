"""`grpo rewards evaluate`: everything checked first, then rewards run over labelled samples, then the report."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.build import build_rewards
from rewards.compose import Rewards
from rewards.lab import conditions, report, running
from rewards.lab.data import Columns, LabData, load
from rewards.lab.verdicts import verdicts


@dataclass(frozen=True, slots=True)
class Options:
    """How to evaluate. `cache`: a file that keeps dear verdicts; `fail_if`: conditions that make `failed` non-empty."""

    columns: Columns = field(default_factory=Columns)
    workers: int = 2
    cache: str = ""
    repeat: int = 1
    probes: bool = False
    fail_if: Sequence[str] = ()
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it: the content of report.json, and a line for each --fail-if condition that holds."""

    report: dict[str, Any]
    failed: list[str]


def evaluate(
    path: str | Path,
    mapping: Mapping[str, Any],
    out: str | Path,
    options: Options = Options(),
    progress: running.Progress = lambda what, done, total: None,
    **resources: Any,
) -> Evaluation:
    """Scores the samples of the file with the rewards of the mapping (as in a recipe) and writes the report into `out`.

    Raises ValueError before any long work: for the data, rewards and options, and where `out` is in use.
    """
    start = time.perf_counter()
    out = Path(out)
    _check_free(out, options.overwrite)
    if options.repeat < 1:
        raise ValueError(f"--repeat is {options.repeat}; give 1 or more")
    with build_rewards(mapping, workers=options.workers, cache=options.cache, **resources) as rewards:
        gold = any("answer" in part.rule.needs and not part.when for part in rewards.parts.values())
        data = load(path, options.columns, gold)
        _check_needs(rewards, data)
        labelled = any(label is not None for label in data.labels)
        wanted = conditions.parse(options.fail_if, list(rewards.parts), labelled, options.probes)
        out.mkdir(parents=True, exist_ok=True)
        read = time.perf_counter()
        scored = running.score_all(rewards, data.inputs, progress)
        totals = rewards.totals({name: column.scores for name, column in scored.items()})
        again = running.determinism(
            lambda workers: build_rewards(mapping, workers=workers, **resources),
            data.inputs,
            scored,
            options.workers,
            options.repeat,
            progress,
        )
        probes = None
        if options.probes:
            from rewards.lab.probes import run_probes

            progress("probes", 0, 0)
            probes = run_probes(rewards, data.inputs, data.labels)
        scoring = time.perf_counter()
    progress("statistics", 0, 0)
    settings = {
        "rewards": dict(mapping),
        "workers": options.workers,
        "repeat": options.repeat,
        "probes": options.probes,
    }
    found = report.assemble(data, rewards, scored, totals, again, probes, settings)
    rows = report.sample_rows(data, scored, totals)
    lines = verdicts(found, rows)
    end = time.perf_counter()
    seconds = {"read": read - start, "score": scoring - read, "analyse": end - scoring, "total": end - start}
    found = {key: found[key] for key in ("schema", "tool", "data", "settings", "versions")} | {
        "seconds": seconds,
        "verdicts": lines,
        **{key: found[key] for key in ("rewards", "total", "agreement", "curves", "probes")},
    }
    progress("report", 0, 0)
    from rewards.lab.page import write_page

    report.write(out, found, rows)
    write_page(found, rows, out / "report.html")
    return Evaluation(found, conditions.holding(wanted, found))


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ValueError(f"--out {str(out)!r} is a file; name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--out {str(out)!r} is not empty; choose another directory, or replace it with --overwrite")
    if not (out / "report.json").is_file():
        raise ValueError(
            f"--out {str(out)!r} holds no report, so --overwrite does not touch it; choose another directory"
        )
    for name in report.FILES:
        (out / name).unlink(missing_ok=True)


def _check_needs(rewards: Rewards, data: LabData) -> None:
    """ValueError naming reward, row, the column that it needs and the nearest one there is."""
    for place, sample in enumerate(data.inputs):
        for name, part in rewards.parts.items():
            for column in sorted(part.when.keys() - sample.fields.keys()):
                raise ValueError(
                    f"{data.where[place]}: rewards.{name}.when names the column {column!r}, which is not there"
                )
            for column in sorted(part.rule.needs - sample.fields.keys()) if part.counts_in(sample.fields) else ():
                close = difflib.get_close_matches(column, list(sample.fields), n=1, cutoff=0.5)
                near = f", did you mean {close[0]!r}?" if close else ";"
                hint = "name it with --answer" if column == "answer" else "add or rename a column"
                raise ValueError(
                    f"{data.where[place]}: reward {name} needs the column {column!r}{near} "
                    f"it has {', '.join(sample.fields)}; {hint}"
                )
