"""Where the roles of a run live: what a backend is, and the one that holds them in this process.

grpo/cluster.py has the one that makes them Ray actors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from grpo.config import Config
from grpo.placement import assign_gpus
from grpo.roles import build_role


class Pending(Protocol):
    """The answer to a call, perhaps not there yet. May be passed on as an argument of another call."""

    def result(self) -> Any: ...


class Backend(Protocol):
    """Where roles live."""

    def call(self, role: str, method: str, *args: Any) -> Pending: ...

    def first(self, pending: Mapping[str, Any]) -> str:
        """The key of a call that has been answered; waits for one."""
        ...

    def close(self) -> None: ...


class Done:
    """A call that has been answered."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


class Inline:
    """All roles in this process."""

    def __init__(self, config: Config, roles: Sequence[str], dirs: dict[str, str]) -> None:
        assign_gpus(config, roles, [torch.cuda.device_count()])
        self.roles = {role: build_role(role, config, dirs) for role in roles}

    def call(self, role: str, method: str, *args: Any) -> Done:
        values = [arg.result() if isinstance(arg, Done) else arg for arg in args]
        return Done(getattr(self.roles[role], method)(*values))

    def first(self, pending: Mapping[str, Any]) -> str:
        return next(iter(pending))

    def close(self) -> None:
        self.roles["rewards"].close()
