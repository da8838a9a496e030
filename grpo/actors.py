"""Ray actors: thin shells around the objects of grpo/roles.py. Everything here is a forwarder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray

from grpo.config import Config
from grpo.roles import build_role


class Host:
    """Hosts one or several roles in a process."""

    def __init__(self, roles: Sequence[str], config: Config, dirs: dict[str, str]) -> None:
        self.roles = {name: build_role(name, config, dirs) for name in roles}

    def call(self, role: str, method: str, *args: Any) -> Any:
        return getattr(self.roles[role], method)(*args)

    def pid(self) -> int:
        return os.getpid()


# One class for each kind of process, so that `ray list actors` and the dashboard say who is who. They ask for no CPU:
# stages take turns, and a laptop with two cores must be able to hold all of them.
@ray.remote(num_cpus=0, max_restarts=0)
class LearnerActor(Host):
    """The learner."""


@ray.remote(num_cpus=0, max_restarts=0)
class RolloutActor(Host):
    """An engine."""


@ray.remote(num_cpus=0, max_restarts=0)
class RewardActor(Host):
    """The rewards."""


@ray.remote(num_cpus=0, max_restarts=0)
class ColocatedActor(Host):
    """All roles in one process."""


KINDS = {"learner": LearnerActor, "rollout": RolloutActor, "rewards": RewardActor, "colocated": ColocatedActor}


def start_host(
    kind: str, name: str, roles: Sequence[str], config: Config, dirs: dict[str, str], gpus: float = 0
) -> Any:
    """An actor of this kind, hosting the roles, that asks for `gpus`; it is being built when this returns."""
    return KINDS[kind].options(name=name, num_gpus=gpus).remote(list(roles), config, dirs)  # type: ignore[attr-defined]
