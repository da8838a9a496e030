"""Tests of Triton kernels on a machine without a GPU: by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """The tests of a file. Triton reads the variable when it is imported, which may be long past here."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


def _patch_once_a_launch() -> None:
    """Triton's interpreter replaces its language's functions anew whenever a kernel calls a function, which takes two
    thirds of the time. Once for each module of a launch is enough: they stay replaced until the launch ends.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):  # another version: as slow as it is
        return
    patch, launch, seen = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in seen:
            return None
        seen.add(module)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **options: Any) -> Any:
        seen.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


if INTERPRETED:
    _patch_once_a_launch()
