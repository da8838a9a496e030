"""Runs the command line in this process, for the tests of its commands."""

from __future__ import annotations

import sys

import pytest

from grpo.cli import main


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `grpo ARGV`."""
    before, sys.argv = sys.argv, ["grpo", *argv]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    out, err = capfd.readouterr()
    return code, out, err
