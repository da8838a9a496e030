"""The code_tests reward: which text is the program, which tests the row has, and what a verdict is worth.

Nothing of the model's is run or parsed in this process: rewards/code_judge.py does it, in a killable worker, with the
program itself in a sandbox.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.sandbox import cgroups, isolation
from rewards.worker import Answer, WorkerPool

TARGET = "rewards.code_judge:make"
TEST_EXTRA_S = 10.0  # for the sandbox to start and the trusted test to compare, on top of the program's time
TRIAL_LIMIT_S = 60.0
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[^\n`]*\n", re.MULTILINE)
_FORMS = "test, test_list, function and cases, inputs and outputs, input_output"


def code_tests(
    *,
    pool: WorkerPool,
    timeout: float = 10.0,
    memory_mb: int = 1024,
    partial: bool = False,
    tolerance: float = 0.0,
    unsafe_local: bool = False,
) -> Rule:
    """1.0 if the completion's program passes all tests of its row, else 0.0; `partial`: the share of tests passed.

    The program is the last fenced block after </think>, or the whole text; one that does not define the function
    continues the row's prompt, as in HumanEval. The tests are the first of these that the row has (JSON text is read):
    `input_output` or `inputs` and `outputs` (stdin and stdout; with `fn_name`, arguments and results), `function` with
    `cases` [[arguments, expected], ...], `test_list` (asserts, with `test_setup_code`, `test_imports`), `test`
    (asserts, or check(candidate)) with `entry_point`.

    `timeout`: seconds for all tests of a completion; `memory_mb`: address space of each of its processes; `tolerance`:
    by which floats may be off, relatively or absolutely, in `cases` and outputs. A crash, a time-out or a flood is the
    program's doing: 0.0 with the reason in info. A row with no usable test is UNPARSEABLE_GOLD, a sandbox that does not
    start is an ERROR. ValueError: a bad option, or no sandbox can be had on this machine. `unsafe_local` does without
    one, for trusted code only: whatever runs this reward can then be read, changed and deceived by the program.
    """
    for name, value in (("timeout", timeout), ("memory_mb", memory_mb)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"rewards.code_tests.{name} is {value!r}; give a number above 0")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(f"rewards.code_tests.tolerance is {tolerance!r}; give a number from 0 to below 1")
    for name, value in (("partial", partial), ("unsafe_local", unsafe_local)):
        if not isinstance(value, bool):
            raise ValueError(f"rewards.code_tests.{name} is {value!r}; give true or false")
    options = {
        "timeout": float(timeout),
        "memory_mb": int(memory_mb),
        "partial": partial,
        "tolerance": float(tolerance),
        "unsafe_local": unsafe_local,
        "owner": os.getpid(),
    }
    _check_sandbox(pool, options)
    pool.preload(TARGET, options)

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        items, places = [], []
        for place, sample in enumerate(inputs):
            try:
                made = item(sample.completion, sample.prompt, sample.fields)
                json.dumps(made)  # a row of what is no JSON must not fail the others
                items.append(made)
                places.append(place)
            except (ValueError, TypeError, KeyError) as error:
                scores[place] = failure(Status.UNPARSEABLE_GOLD, f"the row's tests: {error}")
        for place, answer in zip(places, pool.run(TARGET, options, items, timeout + TEST_EXTRA_S), strict=True):
            scores[place] = _score(answer)
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    def close() -> None:
        pool.close()  # the groups can be removed once nobody is in them
        cgroups.remove(options["owner"])

    return Rule(score, bounds=(0.0, 1.0), runs="sandbox", perfect=perfect, close=close)


def _check_sandbox(pool: WorkerPool, options: Mapping[str, Any]) -> None:
    """ValueError unless a sandbox starts."""
    if options["unsafe_local"]:
        warnings.warn(
            "rewards.code_tests.unsafe_local: programs run WITHOUT a sandbox; only for code you trust", stacklevel=4
        )
        return
    why = isolation.why_not()
    if why is None:
        [answer] = pool.run(TARGET, options, [{"kind": "probe"}], TRIAL_LIMIT_S)
        pool.close()  # it starts anew with what the other rewards preload
        if answer.status is Status.OK:
            return
        why = f"cannot start its sandbox ({answer.reason}); see docs/rewards.md, 'The sandbox'"
    raise ValueError(f"rewards.code_tests {why}; or set rewards.code_tests.unsafe_local for code you trust")


def _score(answer: Answer) -> Score:
    queue_s, run_s = answer.queue_s, answer.run_s
    if answer.status is Status.TIMEOUT:  # the sandbox keeps its own time, so a value it gave made the test hang
        info = {"reason": f"the test took too long: {answer.reason}", "timed_out": True}
        return Score(0.0, info=info, queue_s=queue_s, run_s=run_s)
    if answer.status is not Status.OK:
        return failure(answer.status, answer.reason, queue_s, run_s)
    verdict = answer.result
    if "broken" in verdict:
        return failure(Status.UNPARSEABLE_GOLD, f"the row's test {verdict['broken']}", queue_s, run_s)
    info = {key: verdict[key] for key in ("reason", "timed_out") if verdict.get(key)}
    return Score(float(verdict["value"]), info=info, queue_s=queue_s, run_s=run_s)


def program(text: str) -> str:
    """The last fenced block of what follows </think>, to the end where it does not close; without one, all of it."""
    text = text.rpartition("</think>")[2]
    block, end = None, 0
    while opened := _FENCE.search(text, end):
        closed = re.compile(rf"^[ \t]*{opened[1]}[ \t]*$", re.MULTILINE).search(text, opened.end())
        block, end = text[opened.end() : closed.start() if closed else None], closed.end() if closed else len(text)
    return text if block is None else block


def item(completion: str, prompt: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker is sent: kind, source and tests. ValueError, KeyError or TypeError say what the row lacks."""
    source = program(completion)
    both = _json(fields.get("input_output"))
    if not both and "inputs" in fields and "outputs" in fields:
        both = fields
    if isinstance(both, Mapping):
        cases = _pairs(_json(both["inputs"]), _json(both["outputs"]))
        if not both.get("fn_name"):
            return {"kind": "stdin", "source": source, "cases": [[_text(a), _text(b)] for a, b in cases]}
        if cases and isinstance(cases[0][0], str):  # one JSON value a line
            cases = [[[json.loads(line) for line in a.split("\n")], json.loads(b)] for a, b in cases]
        return {"kind": "cases", "source": source, "entry": both["fn_name"], "cases": cases, "wrapped": True}
    entry = fields.get("entry_point") or fields.get("function")
    source, preamble = _continued(source, entry, fields.get("prompt", prompt))
    if fields.get("cases"):
        if not entry:
            raise ValueError("cases need the column function: the name to call")
        cases = [[list(args), expected] for args, expected in _json(fields["cases"])]
        return {"kind": "cases", "source": source, "entry": entry, "cases": cases, "wrapped": False}
    snippets = _json(fields.get("test_list")) or fields.get("test")
    if not snippets:
        raise ValueError(f"it has none of {_FORMS}")
    snippets = [snippets] if isinstance(snippets, str) else list(snippets)
    setup = [preamble, *(_json(fields.get("test_imports")) or []), fields.get("test_setup_code") or ""]
    return {"kind": "test", "source": source, "entry": entry, "setup": setup, "snippets": snippets}


def perfect(fields: Mapping[str, Any]) -> str | None:
    """The row's own solution (HumanEval's canonical_solution, MBPP's code) as a completion."""
    solution = fields.get("canonical_solution") or fields.get("code")
    return f"```python\n{solution}\n```" if isinstance(solution, str) and solution.strip() else None


def _continued(source: str, entry: str | None, prompt: Any) -> tuple[str, str]:
    """(the program, the code of the prompt): the prompt's helpers and imports come first, its half function too."""
    before = program(_words(prompt))
    name = re.escape(entry or "")
    if not entry or not re.search(rf"^def {name}\b", before, re.MULTILINE):
        return source, ""
    helpers = _standing(before)
    if not re.search(rf"^(?:(?:async )?def|class) {name}\b|^{name}\s*=", source, re.MULTILINE):
        return before + source, helpers
    if re.search(r"^from __future__\b", source, re.MULTILINE):  # must come first
        return source, helpers
    return f"{helpers}\n\n{source}", helpers


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.strip() else value


def _pairs(inputs: Any, outputs: Any) -> list[list[Any]]:
    pairs = [[given, expected] for given, expected in zip(inputs, outputs, strict=True)]
    if not pairs:
        raise ValueError("there are no inputs")
    return pairs


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _words(prompt: Any) -> str:
    """The prompt's text, or that of the last message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    messages = [message for message in prompt or () if isinstance(message, Mapping)]
    return str(messages[-1].get("content", "")) if messages else ""


def _standing(code: str) -> str:
    """Code that may break off after a `def ...:`, as something that compiles; nothing if it does not."""
    for end in ("", "\n    pass\n"):
        try:
            ast.parse(code.rstrip() + end)
            return code.rstrip() + end
        except SyntaxError:
            continue
    return ""
