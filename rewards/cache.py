"""Verdicts that are dear to compute, kept in a SQLite file: a judge is paid once, a program is run once.

A key is the hash of everything a verdict can depend on: the reward's name, version and options, the prompt, the
completion and the row's fields. What failed or ran into a time limit is never kept: it says something about the
machine, not about the completion.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule

_KEPT = (Status.OK, Status.NOT_APPLICABLE)
# options that say how fast a verdict comes, not which one
_PACE = "timeout retries concurrency requests_per_minute tokens_per_minute max_requests max_total_tokens batch_size"


class RewardCache:
    """The file, which several processes may share. ValueError: the path cannot hold one."""

    def __init__(self, path: str | Path) -> None:
        self._lock = threading.Lock()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"reward cache {str(path)!r}: {error}; name another file") from None

    def get(self, keys: Sequence[bytes]) -> list[Score | None]:
        """The verdicts, None where there is none."""
        with self._lock:
            found = [
                self._file.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone() for key in keys
            ]
        return [None if row is None else _read(row[0]) for row in found]

    def put(self, verdicts: Mapping[bytes, Score]) -> None:
        """Keeps those that speak about their completion."""
        rows = [(key, _written(score)) for key, score in verdicts.items() if _keeps(score)]
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows)
            self._file.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self._file.close()


def cached(name: str, rule: Rule, options: Mapping[str, Any], cache: RewardCache) -> Rule:
    """The rule, asked only for what `cache` does not hold. `info` says "cached" where it does."""

    decisive = {key: value for key, value in options.items() if key not in _PACE.split()}

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        keys = [_key(name, rule.version, decisive, sample) for sample in inputs]
        scores = cache.get(keys)
        places: dict[bytes, int] = {}  # equal inputs of a batch are scored once
        for place, (key, known) in enumerate(zip(keys, scores)):
            if known is None:
                places.setdefault(key, place)
        fresh = dict(zip(places, rule.score([inputs[place] for place in places.values()]) if places else []))
        cache.put(fresh)
        return [fresh[key] if known is None else known for key, known in zip(keys, scores)]

    return replace(rule, score=score)


def _key(name: str, version: str, options: Mapping[str, Any], sample: RewardInput) -> bytes:
    ids = None if sample.completion_ids is None else list(map(int, sample.completion_ids))
    parts = [name, version, options, sample.prompt, sample.completion, sample.fields, ids, sample.truncated]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).digest()


def _keeps(score: Score) -> bool:
    return score.status in _KEPT and not score.info.get("timed_out")


def _written(score: Score) -> str:
    row = {"value": score.value, "status": score.status, "parts": dict(score.parts), "info": dict(score.info)}
    return json.dumps(row, default=repr)


def _read(text: str) -> Score:
    row = json.loads(text)
    return Score(row["value"], Status(row["status"]), row["parts"], info={**row["info"], "cached": True})
