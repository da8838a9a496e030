"""Tests of Triton kernels on a machine without a GPU: by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys


def run_interpreted(file: str) -> None:
    """The tests of a file. Triton reads the variable when it is imported, which may be long past here."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]
