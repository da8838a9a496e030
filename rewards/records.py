"""Records of the rewards package: what a reward sees and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """What became of a scoring. Only OK has a value that speaks about quality."""

    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    UNPARSEABLE_GOLD = "unparseable_gold"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class RewardInput:
    """One completion to score.

    `fields` holds every column of the data row under its own name; the gold answer is `fields["answer"]`, whatever
    its column was called. `completion_ids` and `truncated` serve length rewards.
    """

    prompt: str | Sequence[Mapping[str, str]]
    completion: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    completion_ids: Sequence[int] | None = None
    truncated: bool = False  # the completion ran into max_completion_length
    group: str = ""  # samples of one prompt share it


@dataclass(frozen=True, slots=True)
class Score:
    """A verdict. `value` is None unless `status` is OK: a failure is never a silent 0."""

    value: float | None
    status: Status = Status.OK
    parts: Mapping[str, float | None] = field(default_factory=dict)  # reward name -> its unweighted value
    terms: Mapping[str, float | None] = field(default_factory=dict)  # what it counted with: gated, clipped, unweighted
    info: Mapping[str, Any] = field(default_factory=dict)  # why: error text, per-part statuses
    queue_s: float = 0.0  # waited for a worker
    run_s: float = 0.0  # scoring itself

    def __post_init__(self) -> None:
        assert (self.value is not None) == (self.status is Status.OK), f"{self.value=} {self.status=}"
