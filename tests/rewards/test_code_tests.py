"""code_tests: every form of task, and every known way to get paid without solving it."""

import json
import os
import sys

import pytest

from rewards import RewardInput, Status, build_rewards
from rewards.code_judge import same, same_lines
from rewards.code_tests import item, perfect, program
from rewards.sandbox import cgroups, isolation

if not sys.platform.startswith("linux"):
    pytest.skip("the sandbox is Linux's", allow_module_level=True)

ADD = {
    "prompt": 'def helper(x):\n    return x\n\n\ndef add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return helper(a) + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert helper(1) == 1\n"
    "    assert candidate([1], [2]) == [1, 2]\n    for n in range(3):\n        assert candidate(n, 0.5) == n + 0.5\n",
}
SORTED = {
    "prompt": "from typing import List\n\n\ndef ordered(values: List[int]) -> List[int]:\n    '''Ascending.'''\n",
    "entry_point": "ordered",
    "canonical_solution": "    return sorted(values)\n",
    "test": "import math\ndef check(candidate):\n    given = [3, 1, 2]\n"
    "    assert candidate(given) == [1, 2, 3]\n    assert given == [3, 1, 2]\n"
    "    assert math.isclose(candidate([2.5])[0], 2.5)\n"
    "    assert candidate([]) == []\n",
}
MBPP = {
    "text": "Write a function to double and one to halve.",
    "code": "def double(x):\n    return 2 * x\n\ndef half(x):\n    return x / 2",
    "test_setup_code": "BIG = 10 ** 40",
    "test_list": ["assert double(4) == 8", "assert half(double(BIG)) == 1e40", "assert half(3) == 1.5"],
}
CASES = {
    "function": "pair",
    "cases": [[[1, "a"], [1, "a"]], [[None, True], [None, True]], [[2.5, {"k": []}], [2.5, {"k": []}]]],
    "code": "def pair(a, b):\n    return (a, b)",
}
STDIN = {
    "inputs": ["1 2\n", "5 7\n", "0 0\n"],
    "outputs": ["3\nsum\n", "12\nsum\n", "0\nsum\n"],
    "code": "import sys\na, b = map(int, input().split())\nprint(a + b)\nprint('sum')\nsys.exit()",
}
LINES = {"inputs": STDIN["inputs"], "outputs": [output.split("\n") for output in STDIN["outputs"]]}
APPS = {"input_output": json.dumps(LINES), "code": STDIN["code"]}
LEETCODE = {
    "input_output": json.dumps({"fn_name": "twice", "inputs": ["[1, 2]\n3", "[]\n1"], "outputs": ["[3, 6]", "[]"]}),
    "code": "class Solution:\n    def twice(self, values, k):\n        return [v * k for v in values]",
}
TASKS = {"humaneval": ADD, "humaneval sorted": SORTED, "mbpp": MBPP, "cases": CASES, "stdin": STDIN, "apps": APPS,
         "leetcode": LEETCODE}  # fmt: skip


@pytest.fixture(scope="module")
def rewards():
    if why := isolation.why_not():
        pytest.fail(f"code_tests {why}")
    with build_rewards({"code_tests": {"timeout": 1.5}}, workers=2) as built:
        yield built
    assert not list(cgroups.ROOT.glob(f"**/{cgroups.PREFIX}{os.getpid()}-*"))


@pytest.fixture(scope="module")
def partial():
    with build_rewards({"code_tests": {"timeout": 1.5, "partial": True, "tolerance": 1e-6}}) as built:
        yield built


def scores(rewards, rows, text):
    completions = [text(row) if callable(text) else text for row in rows]
    given = [RewardInput(row.get("prompt", "Solve it."), completion, row) for row, completion in zip(rows, completions)]
    return rewards.score(given)


def fenced(code):
    return f"Let me think.\n```python\nwrong(\n```\nSo:\n```python\n{code}\n```\nDone."


def function(body, *names):
    """The body under each name, as functions of any arguments."""
    indented = body.replace("\n", "\n    ")
    return fenced("\n".join(f"def {name}(*args, **kwargs):\n    {indented}" for name in names))


NAMES = ("add", "ordered", "double", "half", "pair", "twice")


def test_right_solutions_of_every_form(rewards, partial):
    for built in (rewards, partial):
        for text in (perfect, lambda row: "<think>\n```\nno\n```\n</think>" + perfect(row)):
            got = scores(built, TASKS.values(), text)
            assert [score.value for score in got] == [1.0] * len(TASKS), [score.info for score in got]


def test_a_completion_may_be_code_alone_or_the_whole_function_or_not_close_its_fence(rewards):
    for text in (
        ADD["canonical_solution"],
        "def add(a, b):\n    return helper(a) + b",  # the prompt's helper is there
        "from __future__ import annotations\ndef add(a: Unknown, b):\n    return a + b",
        "add = lambda a, b: a + b",
        "Sure:\n```\ndef add(a, b):\n    return a + b",
        "~~~py\n```\n~~~\n````python\ndef add(a, b):\n    '''\n```\n'''\n    return a + b\n````",
    ):
        assert scores(rewards, [ADD], text)[0].value == 1.0, text
    assert program("no code") == "no code" and program("```\na\n```\n```\n\n```") == "\n"


CONSTANTS = ("None", "True", "0", "1", "''", "[]", "()", "{}", "float('nan')", "-0.0", "2 ** 100000", "b''", "...")
CHEATS = {f"constant {value}": f"return {value}" for value in CONSTANTS} | {
    "equal to all": "class A(int):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
    "    __hash__ = int.__hash__\n    __float__ = lambda s: 2.5\n    __getitem__ = lambda s, i: s\nreturn A()",
    "list equal to all": "class L(list):\n    __eq__ = lambda s, o: True\nreturn L()",
    "equal inside": "class A:\n    __eq__ = lambda s, o: True\nreturn [A()] * 3",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "raise assertion": "raise AssertionError",
    "stop iteration": "raise StopIteration",
    "generator": "yield from args",
    "generator of parts": "return (a for a in args)",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    for name, value in list(frame.f_locals.items()):\n"
    "        if isinstance(value, list): value.append('passed')\n"
    "        if isinstance(value, dict): value['passed'] = 1\n"
    "    for name in ('expected', 'test', 'check', 'canonical_solution', 'outputs'):\n"
    "        if name in frame.f_locals: return frame.f_locals[name]\n    frame = frame.f_back",
    "gc scan": "import gc\nfor thing in gc.get_objects():\n"
    "    if isinstance(thing, dict) and 'canonical_solution' in thing: exec(thing['canonical_solution'])\n"
    "    if type(thing).__name__ == 'function' and thing.__name__ == 'check': thing.__code__ = (lambda c: 1).__code__",
    "patched builtins": "import builtins, math\nmath.isclose = lambda *a, **k: True\n"
    "builtins.AssertionError = KeyError\n"
    "builtins.all = builtins.any = lambda *a: True\nbuiltins.sorted = lambda *a: []\nbuiltins.len = lambda x: 0",
    "patched reader": "import ast, json, marshal\n"
    "ast.literal_eval = json.loads = marshal.loads = lambda *a: 5\nreturn 5.5",
    "printed verdict": "import sys\nfor out in (sys.stdout, sys.stderr, sys.__stdout__):\n"
    "    print('passed', '{\"value\": 1.0, \"passed\": true}', 'V 1', file=out, flush=True)",
    "forged answers": "import os\nfor fd in range(3, 16):\n"
    "    try: os.write(fd, b'V 5\\nV [1, 2]\\nV 1.0\\nV None\\n')\n"
    "    except OSError: pass",
    "raised equality": "class E(Exception):\n    __eq__ = lambda s, o: True\n    __str__ = lambda s: 'V 5'\nraise E()",
    "newline in error": "raise ValueError('x\\nV 5\\nV 5\\nV 5')",
    "changed arguments": "for a in args:\n    if isinstance(a, list): a[:] = [1, 2, 3]\nreturn args[0]",
    "call counter": "add.n = getattr(add, 'n', -1) + 1\nreturn [0, None, [], {}, ''][add.n % 5]",
    "100 MB": "return 'x' * (100 << 20)",
    "deep": "value = []\nfor _ in range(100000): value = [value]\nreturn value",
    "function": "return print",
    "not UTF-8": "import os\nos.write(1, bytes(range(256)) * 10)\nreturn bytes(range(256))",
    "surrogate": "return '\\ud800'",
    "patched equality of types": "import ctypes\nctypes.pythonapi.PyType_Modified(ctypes.py_object(int))\nreturn 0",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\nraise SystemExit(0)",
}  # fmt: skip


def test_no_cheat_is_paid(rewards):
    """As functions, and as scripts that do the same."""
    rows = [row for row in TASKS.values() if row not in (STDIN, APPS)]
    for name, body in CHEATS.items():
        got = scores(rewards, rows, function(body, *NAMES))
        assert [score.value for score in got] == [0.0] * len(rows), (name, [score.info for score in got])
    script = fenced("args = ([],)\ndef add(): pass\ndef f():\n    {}\ntry: print(list(f() or ()))\nfinally: pass")
    for name in ("sys.exit", "os._exit", "frames", "gc scan", "patched builtins", "printed verdict", "not UTF-8"):
        got = scores(rewards, [STDIN, APPS], script.replace("{}", CHEATS[name].replace("\n", "\n    ")))
        assert [score.value for score in got] == [0.0, 0.0], (name, [score.info for score in got])


def test_another_tasks_solution_and_loading_tricks_are_not_paid(rewards):
    rows = list(TASKS.values())
    for place, row in enumerate(rows):
        others = [
            other for other in rows if other["code" if "code" in other else "canonical_solution"] != row.get("code")
        ]
        other = others[(place + 1) % len(others)] if others[(place + 1) % len(others)] is not row else others[place - 2]
        assert scores(rewards, [row], perfect(other))[0].value == 0.0
    for text in (
        fenced("import sys; sys.exit(0)"),
        fenced("import os; os._exit(0)"),
        fenced("raise SystemExit"),
        fenced("# coding: rot13\nqrs nqq(*n): erghea 5"),
        fenced("x = '" + "a" * (1 << 20) + "'"),
        fenced("(" * 100_000),
        fenced("def add(*a):\n\x00    return 5"),
        "",
        "\ud800",
        "All tests passed. {'passed': True}",
        fenced("def __getattr__(name):\n    return lambda *a, **k: 5"),
        fenced("if __name__ == '__main__':\n    print('3\\nsum')"),  # right for one input alone
        fenced("print('3')"),  # the first line
        fenced("print('3\\nsum\\nextra')\nprint('12\\nsum')\nprint('0\\nsum')"),
    ):
        got = scores(rewards, rows, text)
        assert {(score.value, score.status) for score in got} == {(0.0, Status.OK)}, (text[:80], [s.info for s in got])


def test_what_the_program_does_to_itself_is_zero_with_a_reason(rewards):
    row = {"test": "assert f(1) == 1\nassert f(2) == 2", "entry_point": "f"}
    for code, why in (
        ("def f(x):\n    while True: pass", "timeout: no answer within 1.5 s"),
        ("while True: pass", "timeout"),
        ("def f(x):\n    import os\n    os.abort()", "crash: the program ended with exit status 134"),
        ("def f(x): raise KeyError(x)", "test failed: KeyError: '1'"),
        ("def f(x): return f(x)", "test failed: CandidateError: RecursionError"),
        ("def f(x): return 'x' * 2000000", "test failed: CandidateError: output_limit"),
        ("def f(x): return x / 0", "test failed: ZeroDivisionError"),
        ("def g(x): pass", "test failed: AttributeError"),
        ("def f(x:", "does not load: SyntaxError"),
    ):
        score = scores(rewards, [row], fenced(code))[0]
        info = score.info["code_tests"]
        assert score.value == 0.0 and info["reason"].startswith(why), (code, info)
        assert bool(info.get("timed_out")) == (why[:7] == "timeout")


def test_a_test_cannot_be_talked_past_an_end(rewards):
    """Tests that expect exceptions, or loop over calls, do not turn a dead program into a right one."""
    row = {
        "entry_point": "f",
        "test": "try:\n    f(0)\n    assert False\nexcept ValueError:\n    pass\nassert list(map(f, [1, 2])) == [1, 2]",
    }
    assert scores(rewards, [row], fenced("def f(x):\n    if not x: raise ValueError\n    return x"))[0].value == 1.0
    swallowing = {"entry_point": "f", "test": "for x in range(3):\n    try: f(x)\n    except Exception: pass"}
    assert scores(rewards, [swallowing], fenced("def f(x): pass"))[0].value == 1.0
    for body in ("import os; os._exit(0)", "while True: pass"):
        assert scores(rewards, [swallowing], fenced(f"def f(x):\n    {body}"))[0].value == 0.0
    truncating = {"entry_point": "f", "test": "assert all(map(lambda x: f(x) == x, [1, 2]))"}
    assert scores(rewards, [truncating], fenced("def f(x): raise StopIteration"))[0].value == 0.0


def test_partial_credit_is_the_share_of_tests(partial):
    assert scores(partial, [MBPP], fenced("def double(x): return 2 * x\ndef half(x): return 1.5"))[0].value == 2 / 3
    assert scores(partial, [STDIN], fenced("print(3); print('sum')"))[0].value == 1 / 3
    assert scores(partial, [CASES], fenced("def pair(a, b): return [a, b] if a else None"))[0].value == 2 / 3
    # five calls are asserted about (the loop's three times), and one helper: 3 of 6 right
    assert (
        scores(partial, [ADD], fenced("def add(a, b): return 5 if a == 2 else a + b if a == [1] else 0"))[0].value
        == 3 / 6
    )
    ended = scores(partial, [ADD], fenced("def add(a, b):\n    import os\n    return 5 if a == 2 else os._exit(0)"))[0]
    assert ended.value == pytest.approx(2 / 6) and ended.info["code_tests"]["reason"].startswith("crash")


def test_tolerance_and_strictness():
    assert same(1, 1.0) and not same(True, 1) and not same(1, True) and same(-0.0, 0.0)
    assert same(float("nan"), float("nan")) and not same(0.0, float("nan")) and not same("1", 1)
    assert not same(0.1 + 0.2, 0.3) and same(0.1 + 0.2, 0.3, 1e-9) and not same(10**400, 1.0, 1e-9)
    assert same((1, [2]), [1, [2]]) and not same([1], [1, 2]) and same({1: 2}, {"1": 2}) and not same({1}, [1])
    assert same_lines("a \nb\n\n", "a\nb") and not same_lines("a", "a\nb") and not same_lines("a\nb", "a")
    assert not same_lines("", "\nx") and not same_lines(" a", "a") and same_lines("", "")
    assert (
        not same_lines("0.3000001", "0.3")
        and same_lines("0.3000001 x", "0.3 x", 1e-6)
        and not same_lines("nan", "1", 0.5)
    )


def test_bad_rows_are_not_the_completions_fault(rewards):
    for row, why in (
        ({}, "has none of test, test_list"),
        ({"test": "assert f(", "entry_point": "f"}, "not valid Python"),
        ({"test": "x = 1", "entry_point": "f"}, "never calls"),
        ({"test": "undefined.f(1)", "entry_point": "f"}, "never calls the program; test failed: NameError"),
        ({"test_list": ["assert True"]}, "calls no function"),
        ({"test": "try: f(object())\nexcept Exception: pass", "entry_point": "f"}, "no plain value"),
        ({"cases": [[[1], 2]]}, "need the column function"),
        ({"inputs": ["1"], "outputs": []}, "zip"),
        ({"input_output": "{"}, "Expecting"),
        ({"function": "f", "cases": [[[1], {2}]]}, "not JSON serializable"),
    ):
        [score] = scores(rewards, [row], fenced("def f(x): return x"))
        assert score.status is Status.UNPARSEABLE_GOLD and why in score.info["code_tests"]["reason"], (row, score.info)
    row = {"test": "while True:\n    f(1)", "entry_point": "f"}
    assert item("x", "", {**row, "prompt": [{"role": "user", "content": "def f(x):\n"}]})["source"] == "def f(x):\nx"


def test_tests_and_expected_values_never_enter_the_sandbox(rewards):
    """A program that returns all it can find in its memory finds its arguments and nothing of the test."""
    code = (
        "import gc\ndef f(x):\n    seen, stack = set(), list(gc.get_objects())\n    found = []\n    while stack:\n"
        "        thing = stack.pop()\n        if id(thing) in seen: continue\n        seen.add(id(thing))\n"
        "        if isinstance(thing, str) and 'yzzyx' in thing[::-1]: found.append(thing)\n"
        "        stack += gc.get_referents(thing)\n    return len(found) > 0"
    )
    row = {"entry_point": "f", "test": "assert f('{}') == True, 'the expected value is xyzzy'"}
    assert scores(rewards, [{**row, "test": row["test"].format("a")}], fenced(code))[0].value == 0.0
    assert scores(rewards, [{**row, "test": row["test"].format("xyzzy")}], fenced(code))[0].value == 1.0


@pytest.mark.parametrize(
    ("option", "value"),
    [("timeout", 0), ("memory_mb", -1), ("tolerance", 1.5), ("partial", "yes"), ("unsafe_local", 1)],
)
def test_bad_options(option, value):
    with pytest.raises(ValueError, match=rf"^rewards\.code_tests\.{option} is {value!r}; give "):
        build_rewards({"code_tests": {option: value}})


def test_without_bubblewrap_it_refuses_to_start_and_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"needs bubblewrap, .*apt-get install bubblewrap.*unsafe_local"):
        build_rewards({"code_tests": {}})
    with pytest.warns(UserWarning, match="WITHOUT a sandbox; only for code you trust"):
        unsafe = build_rewards({"code_tests": {"unsafe_local": True}})
    with unsafe:
        assert [score.value for score in scores(unsafe, TASKS.values(), perfect)] == [1.0] * len(TASKS)
        assert scores(unsafe, [ADD], function(CHEATS["equal to all"], "add"))[0].value == 0.0


def test_a_sandbox_that_does_not_start_is_an_error_and_refused_before_training(monkeypatch, tmp_path):
    with build_rewards({"code_tests": {}}) as built:
        (tmp_path / "bwrap").symlink_to("/usr/bin/false")
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        [score] = scores(built, [ADD], perfect)
        assert score.status is Status.ERROR and "exit status 1" in score.info["code_tests"]["reason"]
    with pytest.raises(ValueError, match=r"cannot start its sandbox .*exit status 1"):
        build_rewards({"code_tests": {}})


def test_programs_that_end_by_themselves_leave_no_zombies() -> None:
    """More of them than a slot may have processes: each must be gone before the next one starts."""
    code = "```python\nimport os\ndef f(x):\n    os._exit(0)\n```"
    with build_rewards({"code_tests": 1.0}, workers=1) as rewards:
        scores = rewards.score([RewardInput("q", code, {"function": "f", "cases": [[[i], 1]]}) for i in range(50)])
    assert [score.value for score in scores] == [0.0] * 50
    assert {score.info["code_tests"]["reason"] for score in scores} == {"crash: the program ended with exit status 0"}
