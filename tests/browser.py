"""Headless Chromium for tests of pages: the page runs, a script of the test drives it, and what it saw comes back."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# Before anything of the page runs: what goes wrong in it, scripts that the page's own policy stops included.
WATCH = """<script>
const errors = [], consoleError = console.error;
addEventListener("error", event => errors.push(String(event.message)));
addEventListener("unhandledrejection", event => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => errors.push(`policy: ${event.violatedDirective}`));
for (const way of ["alert", "confirm", "prompt"]) window[way] = () => errors.push(way);
console.error = (...words) => { errors.push(words.join(" ")); consoleError(...words); };
</script>"""


def drive(page: Path, script: str, folder: Path, width: int = 1400) -> tuple[Any, list[str]]:
    """Opens the page and runs the script, the body of a function that returns something JSON can hold.

    Gives that and the errors: exceptions, console errors, dialogs, violations of the page's policy, and what the
    browser's own log says of them. Skips where Chromium is missing, but not in CI: there it is a failure.
    """
    if shutil.which("chromium") is None and not os.environ.get("CI"):
        pytest.skip("chromium is not installed")
    text = page.read_text(encoding="utf-8")
    assert "<head>" in text and text.count("</body>") >= 1
    start, end = text.index("<head>") + len("<head>"), text.rindex("</body>")
    ending = f"""<script>
const report = document.createElement("pre");
report.id = "seen";
let seen;
try {{ seen = (() => {{ {script} }})(); }} catch (error) {{ errors.push(String(error)); }}
setTimeout(() => {{ report.textContent = JSON.stringify([seen ?? null, errors]); document.body.append(report); }}, 500);
</script>"""
    driven = folder / "driven.html"
    driven.write_text(text[:start] + WATCH + text[start:end] + ending + text[end:], encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    command = ["chromium", *options, "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen, errors = json.loads(html.unescape(found[1]))
    return seen, [*errors, *re.findall(r".*CONSOLE.*(?:Error|Refused|blocked).*", done.stderr)]
