"""What there is to choose from: every built-in reward with where it runs, what it needs and what it gives."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from rewards.build import REGISTRY, build_rewards

PLACES = {"inline": "inline", "worker": "killable worker", "sandbox": "sandbox", "model": "model"}


def catalogue() -> list[dict[str, str]]:
    """[{"name", "runs", "needs", "gives"}] by name. A reward that cannot be built here says why under "needs"."""
    return [_entry(name, target) for name, target in sorted(REGISTRY.items())]


def _entry(name: str, target: str) -> dict[str, str]:
    module, _, attribute = target.partition(":")
    try:
        builder = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        return {"name": name, "runs": "?", "needs": str(error), "gives": ""}
    gives = " ".join((inspect.getdoc(builder) or "").split("\n\n")[0].split())
    parameters = inspect.signature(builder).parameters.values()
    required = [each for each in parameters if each.default is inspect.Parameter.empty and each.name != "pool"]
    try:  # any value of the right kind will do to see what the reward is
        with build_rewards({name: {each.name: _some(str(each.annotation)) for each in required}}) as rewards:
            rule = rewards.parts[name].rule
    except (ValueError, TypeError) as error:
        found = re.search(rf'"({"|".join(PLACES)})"', inspect.getsource(inspect.getmodule(builder) or builder))
        missing = f"options {', '.join(each.name for each in required)}" if required else " ".join(str(error).split())
        return {"name": name, "runs": PLACES[found[1] if found else "inline"], "needs": missing, "gives": gives}
    needs = [*sorted(rule.needs), *(f"option {each.name}" for each in required)]
    return {"name": name, "runs": PLACES[rule.runs], "needs": ", ".join(needs) or "-", "gives": gives}


def _some(annotation: str) -> Any:
    return 1 if annotation.startswith(("int", "float")) else "x"
