"""Limits on all processes of a sandbox together: how many, and how much memory. Where the machine lets us set them.

A control group a sandbox slot, made by the worker, joined by each sandbox before it gives up root. Version 1
(a tree for pids and one for memory) and version 2 (one tree, its controllers switched on) are found by looking; where
neither can be written, rlimits are what remains. Names carry the owner's process id, so that what a killed run left
behind is found and removed by the next one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "grpo-sandbox-"
_FILES = {"pids": ("pids.max", "pids.max"), "memory": ("memory.limit_in_bytes", "memory.max")}  # version 1, version 2


def make(owner: int, slot: int, limits: dict[str, int]) -> list[Path]:
    """The `cgroup.procs` files that a sandbox's first process writes itself into; [] where there are no groups.

    `limits`: controller (pids, memory) -> processes, bytes; always the same for one slot.
    """
    joined = []
    for tree, controllers in _trees():
        group = tree / f"{PREFIX}{owner}-{slot}"
        try:
            if not group.is_dir():
                group.mkdir()
                for controller in controllers & limits.keys():
                    file = _FILES[controller][tree == ROOT]
                    (group / file).write_text(str(limits[controller]))
        except OSError:  # a read-only or delegated tree
            continue
        joined.append(group / "cgroup.procs")
    return joined


def remove(owner: int) -> None:
    """Remove the owner's groups, whose processes are dead or dying, and those of owners that are gone."""
    deadline = time.monotonic() + 2.0
    for tree, _ in _trees():
        for group in tree.glob(f"{PREFIX}*-*"):
            match = re.fullmatch(rf"{PREFIX}(\d+)-\d+", group.name)
            if match is None or (int(match[1]) != owner and Path(f"/proc/{match[1]}").exists()):
                continue
            while True:
                try:
                    group.rmdir()
                except FileNotFoundError:
                    break
                except OSError:  # still busy
                    if int(match[1]) == owner and time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                break


def _trees() -> Iterator[tuple[Path, set[str]]]:
    """Directories where groups can be made, with the controllers that work there."""
    if (ROOT / "cgroup.controllers").is_file():
        try:
            controllers = set((ROOT / "cgroup.subtree_control").read_text().split()) & _FILES.keys()
        except OSError:
            return
        if controllers and os.access(ROOT, os.W_OK):
            yield ROOT, controllers
        return
    for controller in _FILES:
        if (ROOT / controller / "cgroup.procs").is_file() and os.access(ROOT / controller, os.W_OK):
            yield ROOT / controller, {controller}
