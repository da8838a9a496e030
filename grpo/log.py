"""The run's record on disk: metrics.jsonl (an object a step), samples.jsonl and tensorboard/ in the run directory.

Invariant: steps in metrics.jsonl strictly increase, over crashes and resumes too. A line is one write, so a killed run
loses at most the line it was writing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class RunLog:
    """Appends to a run directory.

    with RunLog(run_dir, resume_step=None) as log:
        log.samples(rows)                        # first, so that a step in metrics has its samples
        log.metrics({"step": 1, "reward": 0.5})
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        """`resume_step`: step of the checkpoint that the run goes on from: later rows are dropped. None: all are.

        Raises ValueError naming file and line for a file that is damaged before its last line.
        """
        # here, because it imports torch and readers of a run need none
        from torch.utils.tensorboard import SummaryWriter

        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        keep = -1 if resume_step is None else resume_step
        self._last = -1
        for name in (METRICS, SAMPLES):
            write_rows(directory / name, (row for row in _read(directory / name) if row["step"] <= keep))
        for row in _read(directory / METRICS):
            self._last = row["step"]
        self._files: dict[str, BinaryIO] = {
            name: (directory / name).open("ab", buffering=0) for name in (METRICS, SAMPLES)
        }
        # Event files cannot be shortened: purge_step makes TensorBoard hide what came later.
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=keep + 1)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Writes the row of a step; it must have a `step` later than the last one. Numbers of any library will do."""
        plain = {name: _plain(value) for name, value in row.items()}
        step = plain["step"]
        assert isinstance(step, int) and step > self._last, f"{step=} must come after {self._last}"
        self._last = step
        self._files[METRICS].write(_line(plain))
        for name, value in plain.items():
            if name != "step" and value is not None:
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes scored samples. Keys: step, prompt_id, prompt, sample, completion, scores {name: value or None},
        reward, status, advantage, policy_version, policy_versions [[version, tokens], ...], finish_reason, length."""
        self._files[SAMPLES].write(b"".join(_line(_plain(row)) for row in rows))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, [] before the first; NaN was written as None. Raises ValueError for a damaged file."""
    return list(_read(_existing(run_dir) / METRICS))


def load_samples(run_dir: str | Path) -> list[dict[str, Any]]:
    """Rows of samples.jsonl, [] before the first. Raises ValueError for a damaged file."""
    return list(iter_samples(run_dir))


def iter_samples(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The same one by one, for files that do not fit into memory."""
    return _read(_existing(run_dir) / SAMPLES)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole file of JSON lines in place of what was there; `rows` may be read from the file it replaces."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(map(_line, rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _existing(run_dir: str | Path) -> Path:
    if not Path(run_dir).is_dir():
        raise ValueError(f"run directory {str(run_dir)!r} does not exist; give the run.output_dir of a run")
    return Path(run_dir)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file that may lack its end (the writer was killed), or be missing."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as err:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}:{number}: damaged line ({err}); remove it to go on") from err
                return
            if row is not None:
                yield row


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def _plain(value: Any) -> Any:
    """JSON's types: scalars of numpy and torch become numbers, what is not finite becomes null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if not isinstance(value, float):
        return _plain(value.item())
    return value if math.isfinite(value) else None
