"""math_answer against math-verify's defaults on math-verify's own test pairs. Writes results/math_pairs.json.

    python -m benchmarks.math_pairs

The 275 pairs come from the source distribution of math-verify 0.9.0, fetched into runs/.cache and never committed; a
pytest collection lists them without running a test. Their tests run with settings of their own (rounding, strictness,
one kind of parser); here every pair meets the defaults, ours and theirs. A pair is `disputed` where its label follows
from such a setting or is not mathematics; figures without those stand beside the figures with all.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common import CACHE, machine, versions, write_result
from rewards import RewardInput, build_rewards

CLAIM = "On math-verify's own test pairs math_answer reaches an accuracy of 97.8 % at a false positive rate of 4.7 %."
VERSION = "0.9.0"
COLLECT = """
import json, sys, pytest
class Pairs:
    def pytest_collection_modifyitems(self, items):
        tables = [(item.originalname, getattr(getattr(item, "callspec", None), "params", {})) for item in items]
        rows = [(name, t["gold"], t["pred"], int(t.get("expected", t.get("result")))) for name, t in tables if "pred" in t and "gold" in t]
        json.dump(rows, open("pairs.json", "w"))
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "tests"], plugins=[Pairs()]))
"""  # noqa: E501
DISPUTED = {  # (test, gold, part of the prediction): why the label does not say what is right
    ("test_latex_notation", "$9$", "\n 9 \n"): "0 only because the test reads inline formulas of one line",
    ("test_complex_math_expressions", "\\frac{1}{3}", "0.33"): "1 only with rounding to two decimals",
    ("test_complex_math_expressions", "\\frac{8}{3}", "2.6667"): "1 only with rounding to four decimals",
    ("test_set_rel_assymetry", "x \\in [-2,7]", "-2 "): "stands there twice, as 1 and as 0, by setting",
    ("test_strict_variable_comparison", "f(x)", "f(y)"): "stands there twice, as 1 and as 0, by setting",
    ("test_string_extraction", "1 - \\frac{1}{\\mathrm{e}}", "1 + \\frac{1}"): "1 - 1/e is not 1 + 1/e",
    ("test_relations_math", "x = 11", "5+5+1 = 7 =11"): "the chain contradicts itself",
    ("test_relations_math", "x = 1/3", "5+5+1 = 1/3"): "the chain contradicts itself",
    ("test_relations_math", "1/3", "1/3\\approx1.3"): "the chain contradicts itself",
    ("test_relations_math", "z = 1 + 1 = 2", "3+3 = 2"): "the chain contradicts itself",
}
# What is known to go wrong (math-verify #14, and facts of our own): (gold, answer in a box, right or not)
TRAPS = [
    ("42", "41=42", 0), ("42", "1=2=42", 0), ("42", r"42\approx 41", 0), ("42", r"4200\%", 0), ("42", "42", 1),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", 0), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", 0),
    ("0.0000001", "0.0000002", 0), ("5050", r"\sum_{k=1}^{100} k", 0), (r"\frac13", r"\int_0^1 x^2 dx", 0),
    (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}", 0), (r"1-\frac{1}{\mathrm{e}}", r"1-\frac1{\mathrm{e}}", 1),
    ("12{:}30", "12{:}30", 1), (r"(-\infty,3)", "x<3", 1), (r"(-\infty,3)", "x<-3", 0), ("pi/6", r"30^\circ", 1),
    ("pi/6", r"60^\circ", 0), ("B", "B", 1), ("B", "C", 0), ("1,22", "1.22", 1), ("12", "1, 2", 0),
    (r"\frac{1}{2}", "0.5", 1), ("x^2", "x^2", 1), (r"\frac{8}{3}", "2.6667", 1), (r"\frac{8}{3}", "2.67", 0),
]  # fmt: skip


def pairs() -> list[tuple[str, str, str, int]]:
    """(test, gold, prediction, label), fetched once. SystemExit: the source distribution cannot be had."""
    folder = CACHE / f"math-verify-{VERSION}"
    kept = folder / "pairs.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", ":all:", "--no-deps", "--dest", folder]
        if subprocess.run([*map(str, pip), f"math-verify=={VERSION}"]).returncode:
            raise SystemExit(f"error: the source of math-verify {VERSION} cannot be fetched; connect to an index")
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source = folder / f"math_verify-{VERSION}"
        subprocess.run([sys.executable, "-c", COLLECT], cwd=source, check=True, stdout=subprocess.DEVNULL)
        (source / "pairs.json").replace(kept)
    return [tuple(row) for row in json.loads(kept.read_text())]


def dispute(row: tuple[str, str, str, int]) -> str:
    test, gold, prediction, _ = row
    return next((why for (t, g, p), why in DISPUTED.items() if t == test and g in gold and p in prediction), "")


def ours(rows: Sequence[tuple[str, str]]) -> list[float | None]:
    """Values of math_answer for (gold, completion); None where it has no verdict."""
    with build_rewards({"math_answer": {"timeout": 10.0}}) as rewards:
        return [s.value for s in rewards.score([RewardInput("", text, {"answer": gold}) for gold, text in rows])]


def theirs(rows: Sequence[tuple[str, str]]) -> list[float | None]:
    """The same by math-verify as its README calls it."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return [float(verify(parse(gold), parse(text))) for gold, text in rows]


def rates(values: Sequence[float | None], labels: Sequence[int]) -> dict[str, Any]:
    """Accuracy, false positive and false negative rates in percent. No verdict is no agreement, and no positive."""
    wrong = [value for value, label in zip(values, labels) if label == 0]
    right = [value for value, label in zip(values, labels) if label == 1]
    return {
        "accuracy": 100 * sum(value == label for value, label in zip(values, labels)) / len(labels),
        "fpr": 100 * sum(value == 1 for value in wrong) / len(wrong),
        "fnr": 100 * sum(value != 1 for value in right) / len(right),
        "pairs": len(labels),
        "no_verdict": sum(value is None for value in values),
    }


def main() -> None:
    before = machine()
    rows = pairs()
    undisputed = [place for place, row in enumerate(rows) if not dispute(row)]
    results: dict[str, Any] = {"versions": versions("math-verify", "latex2sympy2-extended", "sympy")}
    sides: dict[str, Callable[[Sequence[tuple[str, str]]], list[float | None]]] = {
        "math_answer": ours,
        "math-verify defaults": theirs,
    }
    for side, grade in sides.items():
        values, labels = grade([(gold, prediction) for _, gold, prediction, _ in rows]), [row[3] for row in rows]
        traps = grade([(gold, f"\\boxed{{{answer}}}") for gold, answer, _ in TRAPS])
        results[side] = {
            "all pairs": rates(values, labels),
            "undisputed pairs": rates([values[i] for i in undisputed], [labels[i] for i in undisputed]),
            "traps": rates(traps, [label for _, _, label in TRAPS]),
            "disagreements": [
                {"test": row[0], "gold": row[1][-80:], "prediction": row[2][-80:], "label": row[3], "why": dispute(row)}
                for row, value in zip(rows, values)
                if value != row[3]
            ],
        }
        for block in ("all pairs", "undisputed pairs", "traps"):
            share = results[side][block]
            print(f"{side}, {block}:", ", ".join(f"{key} {share[key]:.1f} %" for key in ("accuracy", "fpr", "fnr")))
    print(write_result("math_pairs", CLAIM, before, results))


if __name__ == "__main__":
    main()
