"""The house rules, read from the source text: who may import whom, what lives where, and how big a thing may grow."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "rollout", "rewards", "grpo")
MAY_IMPORT = {
    "model": set(),
    "rollout": {"model"},
    "rewards": {"model"},
    "grpo": {"model", "rollout", "rewards"},
}
CONFINED = {
    "ray": r"grpo/(cluster|actors)\.py",
    "vllm": r"rollout/vllm_\w+\.py",
    "triton": r"(model/kernels|model/fp8|rollout/paged)/.*",
}
PURE = ("grpo/advantages.py", "grpo/losses.py", "grpo/packing.py")  # all must exist
RECORDS = {
    "rollout": {"SamplingParams", "Completion"},
    "rewards": {"RewardInput", "Score"},
    "grpo": {"Prompt", "Sample", "Group", "PackedBatch", "StepStats"},
}
LOOP_STAGES = ("sample", "score", "advantage", "pack", "step", "sync")
MAX_LOOP_LINES, MAX_FUNCTION_LINES, MAX_FILE_LINES = 40, 80, 420
IMPORT_NAMES = {"pyyaml": "yaml"}  # distributions whose module has another name
SKIP = {
    ".git",
    ".venv",
    ".venv-peers",
    ".venv-vllm",
    ".venv-rewards",
    "runs",
    "build",
    "dist",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
}


@cache
def files(*folders: str, suffix: str = "") -> tuple[str, ...]:
    """Paths of the project's files, relative to its root."""
    found = []
    for top in folders or (".",):
        for folder, names, leaves in os.walk(ROOT / top):
            names[:] = [name for name in names if name not in SKIP and not name.endswith(".egg-info")]
            found += [str((Path(folder) / leaf).relative_to(ROOT)) for leaf in leaves if leaf.endswith(suffix)]
    return tuple(sorted(found))


def sources(*folders: str) -> tuple[str, ...]:
    return files(*(folders or PACKAGES), suffix=".py")


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), path)


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in sources()}


def imports(path: str, module_level_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and `import_module("...")` included.

    `from a import b` gives a.b where that is a module of ours, else a.
    """
    inside = {id(node) for function in functions(path) for node in ast.walk(function)} if module_level_only else set()
    for node in ast.walk(tree(path)):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                keep = len(package) - node.level + path.endswith("__init__.py")
                base = ".".join([*package[:keep], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def functions(path: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def none_of(offenders: list[str], rule: str) -> None:
    assert not offenders, f"{rule}:\n  " + "\n  ".join(offenders)


def test_packages_import_only_downwards() -> None:
    offenders = [
        f"{path}:{line} imports {name}"
        for path in sources()
        for line, name in imports(path)
        if (top := name.split(".")[0]) in PACKAGES and top not in MAY_IMPORT[own := path.split("/")[0]] | {own}
    ]
    none_of(offenders, f"allowed: {MAY_IMPORT}")


def test_no_package_imports_tests_or_benchmarks() -> None:
    offenders = [
        f"{path}:{line} imports {name}"
        for path in sources()
        for line, name in imports(path)
        if name.split(".")[0] in ("tests", "benchmarks", "configs", "docs")
    ]
    none_of(offenders, "packages stand alone")


def test_no_import_cycles() -> None:
    graph = {module: sorted({name for _, name in imports(path) if name in MODULES}) for module, path in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        found = next((cycle for name in graph[module] if (cycle := walk(name, [*trail, module]))), None)
        done.add(module)
        return found

    cycles = [" -> ".join(cycle) for module in graph if (cycle := walk(module, []))]
    none_of(cycles, "import cycle, lazy imports counted")


@pytest.mark.parametrize("library", CONFINED)
def test_library_is_confined(library: str) -> None:
    offenders = [
        f"{path}:{line}"
        for path in sources()
        for line, name in imports(path)
        if name.split(".")[0] == library and not re.fullmatch(CONFINED[library], path)
    ]
    none_of(offenders, f"{library} is imported only in {CONFINED[library]}")


@pytest.mark.parametrize("path", PURE)
def test_pure_maths_imports_torch_or_numpy_at_most(path: str) -> None:
    assert (ROOT / path).is_file(), f"{path} holds the pure maths and is missing"
    allowed = sys.stdlib_module_names | {"torch", "numpy"}
    own = {f"{package}.records" for package in PACKAGES} | {module_name(pure) for pure in PURE}
    offenders = [f"{path}:{line} imports {name}" for line, name in imports(path)
                 if name.split(".")[0] not in allowed and name not in own]  # fmt: skip
    none_of(offenders, "torch, numpy, the records and other pure maths at most")


def dependencies() -> tuple[set[str], set[str]]:
    """Import names of the core dependencies, and of those in extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        plain = [re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements]
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in plain}

    extras = project.get("optional-dependencies", {}).values()
    return names(project["dependencies"]), set().union(*map(names, extras))


def test_every_library_is_declared_and_optional_ones_are_imported_lazily() -> None:
    """A reward rule imports its checker (math-verify, ...) inside a function: without the extra, the rest works."""
    core, extra = dependencies()
    free = sys.stdlib_module_names | core | set(PACKAGES)
    offenders = []
    for path in sources():
        eager = set(imports(path, module_level_only=True))
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in free or top in CONFINED:  # a confined library's files are themselves imported lazily
                continue
            if top not in extra:
                offenders.append(f"{path}:{line} imports {top}, which pyproject.toml does not list")
            elif (line, name) in eager:
                offenders.append(f"{path}:{line} imports {top}, an optional library, at module level")
    none_of(offenders, "core libraries anywhere, those of extras inside functions")


def test_confined_libraries_are_not_needed_to_import_a_package() -> None:
    """Files that import ray, vllm or triton at module level are imported inside functions by all others."""
    heavy = {
        module_name(path)
        for path in sources()
        for _, name in imports(path, module_level_only=True)
        if name.split(".")[0] in CONFINED
    }
    offenders = [
        f"{path}:{line} imports {name} at module level"
        for path in sources()
        for line, name in imports(path, module_level_only=True)
        if name in heavy and module_name(path) not in heavy
    ]
    none_of(offenders, "lazily, as the library may be absent")


@pytest.mark.parametrize("package", RECORDS)
def test_records_live_in_records(package: str) -> None:
    home = f"{package}/records.py"
    classes = {
        (path, node.name): node for path in sources() for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)
    }
    none_of([name for name in RECORDS[package] if (home, name) not in classes], f"missing in {home}")
    none_of(
        [f"{path}: {name}" for path, name in classes if name in RECORDS[package] and path != home], f"not in {home}"
    )
    thawed = [
        name
        for name in RECORDS[package]
        if not any("frozen=True" in ast.unparse(decorator) for decorator in classes[home, name].decorator_list)
    ]
    none_of(thawed, "records are frozen dataclasses")


def test_every_package_is_listed_in_pyproject() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(Path(path).parent).replace("/", ".") for path in sources()}
    assert set(listed) == folders, f"pyproject.toml lists {sorted(listed)}; folders with Python: {sorted(folders)}"
    none_of([folder for folder in folders if folder not in MODULES], "folders without __init__.py")


def test_no_file_is_named_like_a_stdlib_module() -> None:
    offenders = [path for path in sources(".") if Path(path).stem in sys.stdlib_module_names]
    none_of(offenders, "shadows the standard library")


def test_tests_and_benchmarks_are_no_packages() -> None:
    none_of([path for path in sources("tests", "benchmarks") if path.endswith("__init__.py")], "remove")


def test_configuration_imports_no_torch() -> None:
    code = "import sys, grpo.config; print(*{'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"grpo.config imports {done.stdout.strip()}"


def test_the_loop_is_the_table_of_contents() -> None:
    path = "grpo/loop.py"
    assert (ROOT / path).is_file(), f"{path}, the table of contents of the project, does not exist yet"
    loops = [node for node in ast.walk(tree(path)) if isinstance(node, ast.For | ast.While)]
    shown = [node for node in loops if all(stage in ast.unparse(node).lower() for stage in LOOP_STAGES)]
    assert shown, f"no loop of {path} shows all of {LOOP_STAGES}"
    size = min(map(lines_of, shown))
    assert size <= MAX_LOOP_LINES, f"the loop has {size} lines; at most {MAX_LOOP_LINES}"
    diagram = (ast.get_docstring(tree(path)) or "").count("-->")
    assert diagram, f"{path} starts with no diagram (-->) of who waits for what"


def test_files_and_functions_stay_small() -> None:
    offenders = []
    for path in sources(*PACKAGES, "tests", "benchmarks"):
        count = len((ROOT / path).read_text().splitlines())
        if count > MAX_FILE_LINES:
            offenders.append(f"{path}: {count} lines, at most {MAX_FILE_LINES}")
        offenders += [
            f"{path}:{function.lineno} {function.name}: {lines_of(function)} lines, at most {MAX_FUNCTION_LINES}"
            for function in functions(path)
            if lines_of(function) > MAX_FUNCTION_LINES
        ]
    none_of(offenders, "split by job")


def test_every_file_says_what_it_is_for() -> None:
    offenders = [
        path
        for path in sources(*PACKAGES, "tests", "benchmarks")
        if tree(path).body and not ast.get_docstring(tree(path))  # an empty __init__.py says nothing
    ]
    none_of(offenders, "no docstring")


def test_nothing_names_a_path_of_one_machine() -> None:
    machine = re.compile(rb"(?<![\w.-])/(" + b"|".join([b"work", b"farm", b"root", b"home/\\w+", b"tmp/v"]) + rb")/")
    offenders = []
    for path in files():
        for number, line in enumerate((ROOT / path).read_bytes().split(b"\n"), 1):
            if machine.search(line):
                offenders.append(f"{path}:{number}: {line[:100]!r}")
    none_of(offenders, "paths of this machine")


def test_no_unfinished_work() -> None:
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]))
    offenders = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in files(*PACKAGES, "tests", "benchmarks", "configs", "docs", ".ci")
        if not path.endswith((".json", ".jsonl", ".parquet"))
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if marks.search(line)
    ]
    none_of(offenders, "finish it or leave it out")
