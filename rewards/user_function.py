"""A user's own function as a reward: found and checked without running it here, called in a killable worker.

How it is called is its style: ours, or that of another framework (rewards/adapters.py).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from rewards.adapters import STYLES
from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, as_score, failure
from rewards.worker import Answer, WorkerPool

TARGET = "rewards.user_function:make"
_FIELDS_IT_CANNOT_DO_WITHOUT = {"answer", "data_source"}  # if it reads them; others have an empty form


def user_function(
    name: str,
    function: str,
    *,
    pool: WorkerPool,
    timeout: float = 10.0,
    style: str = "own",
    batch: str = "sample",
    kwargs: Mapping[str, Any] | None = None,
) -> Rule:
    """The reward at "pkg.module:fn" or "path/to/file.py:fn", called as `style` says (rewards/adapters.py).

    Style own: `fn(completion: str, prompt, **fields) -> float | None`, sync or async. Named parameters without a
    default are the data fields it needs; with **fields it gets every column. Fields reach it as JSON values. An
    exception, a non-number or NaN is an ERROR; a call of more than `timeout` seconds is a TIMEOUT; neither has a
    value, because the function is at fault. `batch`: a call scores one sample, or with "group" all samples of a
    prompt, which then also share a failure. `kwargs`: further arguments of a call; for slime the attributes of its
    args. ValueError: there is no such file, module, function or style.
    """
    where, colon, attribute = function.rpartition(":") if isinstance(function, str) else ("", "", "")
    if not colon or not where or not attribute.isidentifier():
        raise ValueError(f'rewards.{name}.function is {function!r}; write "pkg.module:fn" or "path/to/file.py:fn"')
    grouped, further = _options(name, style, batch, kwargs)
    source = _source(name, where)
    needs, wanted = _signature(name, source, attribute, style) if source is not None else (frozenset(), None)
    path = f"{source if where.endswith('.py') else where}:{attribute}"
    options = {"function": path, "style": style, "grouped": grouped, "kwargs": further}

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        items, calls = [], []
        for places in _groups(inputs) if grouped else [[place] for place in range(len(inputs))]:
            try:
                items.append([_item(inputs[place], wanted, STYLES[style].token_ids) for place in places])
                calls.append(places)
            except TypeError as error:
                for place in places:
                    scores[place] = failure(Status.ERROR, str(error))
        for places, answer in zip(calls, pool.run(TARGET, options, items, timeout), strict=True):
            for index, place in enumerate(places):
                scores[place] = _score(answer, index, len(places))
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    version = hashlib.sha256(source.read_bytes()).hexdigest() if source is not None else "1"
    return Rule(score, needs - further.keys(), runs="worker", version=version, grouped=grouped)


def make(
    function: str, style: str, grouped: bool, kwargs: Mapping[str, Any]
) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
    """In the worker: import the user's function; what is returned scores the samples of one call."""
    where, _, attribute = function.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        sys.path.insert(0, str(path.parent))  # its neighbours are importable, as when it is run as a script
        module_name = f"user_reward_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    call = getattr(module, attribute)
    return lambda samples: STYLES[style].call(call, samples, kwargs, grouped)


def _options(name: str, style: str, batch: str, kwargs: Any) -> tuple[bool, dict[str, Any]]:
    """(whole groups?, the further arguments), checked."""
    if style not in STYLES:
        raise ValueError(f"rewards.{name}.style is {style!r}; known: {', '.join(STYLES)}")
    if batch not in ("sample", "group"):
        raise ValueError(f"rewards.{name}.batch is {batch!r}; give sample or group")
    if batch == "group" and not STYLES[style].groups:
        able = ", ".join(known for known, convention in STYLES.items() if convention.groups)
        raise ValueError(f"rewards.{name}.batch is 'group', but style {style} scores one sample a call; known: {able}")
    kwargs = {} if kwargs is None else kwargs
    try:
        further = json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards.{name}.kwargs {kwargs!r} cannot be written as JSON: {error}") from None
    if not isinstance(further, dict):
        raise ValueError(f"rewards.{name}.kwargs is {kwargs!r}; give a mapping of argument to value")
    return batch == "group", further


def _groups(inputs: Sequence[RewardInput]) -> list[list[int]]:
    """Places of the samples of one prompt, which share `group`, or where that is empty the prompt itself."""
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(inputs):
        groups.setdefault(sample.group or repr(sample.prompt), []).append(place)
    return list(groups.values())


def _item(sample: RewardInput, wanted: frozenset[str] | None, token_ids: bool) -> dict[str, Any]:
    """What the worker gets of a sample. TypeError: something has no JSON form."""
    fields = {key: value for key, value in sample.fields.items() if wanted is None or key in wanted}
    ids = None if sample.completion_ids is None or not token_ids else [int(i) for i in sample.completion_ids]
    item = _plain({"completion": sample.completion, "prompt": sample.prompt, "fields": fields})
    return {**item, "completion_ids": ids, "truncated": sample.truncated}


def _score(answer: Answer, index: int, count: int) -> Score:
    """The Score of one sample of a call with `count` samples."""
    run_s = answer.run_s / count
    if answer.status is not Status.OK:
        return failure(answer.status, answer.reason, answer.queue_s, run_s)
    verdict = answer.result[index]
    score = as_score(verdict["value"])
    info = {**verdict["info"], **score.info}
    return replace(score, parts=verdict["parts"], info=info, queue_s=answer.queue_s, run_s=run_s)


def _source(name: str, where: str) -> Path | None:
    """The file that defines the function; None if the module has no Python source."""
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"rewards.{name}.function: there is no file {path}; give the path of a Python file")
        return path
    spec = _spec(where)
    if spec is None:
        raise ValueError(
            f"rewards.{name}.function: no module {where!r} on the Python path; check it or give a file path"
        )
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _spec(module: str) -> ModuleSpec | None:
    """Where a module is, found without importing the packages it lies in."""
    names, path, spec = module.split("."), None, None
    for depth in range(1, len(names) + 1):
        name = ".".join(names[:depth])
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _signature(name: str, source: Path, attribute: str, style: str) -> tuple[frozenset[str], frozenset[str] | None]:
    """(fields the function requires, fields it takes or None for all), read from its source without running it."""
    convention = STYLES[style]
    taken = None if convention.columns is None else frozenset(convention.columns.values())
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"rewards.{name}.function: {source}:{error.lineno} is not valid Python: {error.msg}") from None
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [node for node in functions if node.name == attribute]
    if not found:
        if attribute in source.read_text(encoding="utf-8", errors="replace"):  # imported, assigned, or made in an if
            return frozenset(), taken
        raise ValueError(f"rewards.{name}.function: {source} defines no {attribute!r}; name a function of that file")
    arguments, first = found[-1].args, convention.first
    positional = [*arguments.posonlyargs, *arguments.args]
    if len(positional) < len(first) and arguments.vararg is None:
        raise ValueError(
            f"rewards.{name}.function: {attribute!r} must take ({', '.join(first)}, ...) as its first {len(first)} "
            "parameters"
        )
    required = positional[len(first) : max(len(first), len(positional) - len(arguments.defaults))]
    required += [
        arg for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
    ]
    names = {argument.arg for argument in required} - convention.provided
    if convention.columns is None:
        named = frozenset(argument.arg for argument in [*positional[len(first) :], *arguments.kwonlyargs])
        return frozenset(names), None if arguments.kwarg is not None else named
    standard = {argument.arg: known for argument, known in zip(positional, first)}
    read = {standard.get(word, word) for word in _reads(found[-1])}
    candidates = {*first, *names} if style != "slime" else {"label"}  # an attribute of its sample
    fields = {convention.columns[word] for word in read & candidates & convention.columns.keys()}
    return frozenset(fields & _FIELDS_IT_CANNOT_DO_WITHOUT), taken


def _reads(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Every name and attribute that the body of a function reads."""
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _plain(value: Any) -> Any:
    """The value as JSON values; arrays become lists, dates ISO text. TypeError names what has no such form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes | bytearray):
        raise TypeError("a field of bytes cannot be handed to a reward function; store text or numbers")
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(
        f"a field of type {type(value).__name__} cannot be handed to a reward function; store text or numbers"
    )
