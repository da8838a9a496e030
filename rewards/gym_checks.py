"""Own answer checks for reasoning-gym data sets whose scorer pays for a wrong answer or runs it as code.

The library's scorers of countdown, puzzle24, the two polynomial tasks, number_sorting, bitwise_arithmetic and the
matrix tasks hand text to eval or to sympy's parser, which runs Python. Here text is read by a grammar of numbers,
names and + - * / **, in exact arithmetic and within limits.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

Polynomial = dict[tuple[tuple[str, int], ...], Fraction]  # sorted (variable, exponent) pairs -> coefficient

_MAX_LENGTH, _MAX_NESTING, _MAX_TERMS, _MAX_DEGREE = 2000, 300, 500, 200
_NUMBER = re.compile(r"[-+]?(?:\d{1,50}/\d{1,50}|\d{1,50}(?:\.\d{0,50})?(?:e[-+]?\d{1,3})?)", re.IGNORECASE)


def polynomial(text: str, variables: Sequence[str] = ()) -> Polynomial:
    """The expression as a polynomial in `variables`. Raises ValueError for anything else and for what grows too big."""
    if len(text) > _MAX_LENGTH or not re.fullmatch(r"[\w\s.+*/()-]*", text, re.ASCII):
        raise ValueError("no polynomial")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("no polynomial") from None
    return _value(tree, variables, 0)


def _value(node: ast.expr, variables: Sequence[str], depth: int) -> Polynomial:
    if depth > _MAX_NESTING:  # a sum nests once a term
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _tidy({(): Fraction(str(node.value))})
    if isinstance(node, ast.Name) and node.id in variables:
        return {((node.id, 1),): Fraction(1)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign = -1 if isinstance(node.op, ast.USub) else 1
        return {powers: sign * factor for powers, factor in _value(node.operand, variables, depth + 1).items()}
    if not isinstance(node, ast.BinOp):
        raise ValueError("no polynomial")
    left, right = (_value(side, variables, depth + 1) for side in (node.left, node.right))
    if isinstance(node.op, ast.Add | ast.Sub):
        sign = -1 if isinstance(node.op, ast.Sub) else 1
        return _tidy({key: left.get(key, Fraction(0)) + sign * right.get(key, Fraction(0)) for key in {*left, *right}})
    if isinstance(node.op, ast.Mult):
        return _product(left, right)
    if not right.keys() <= {()}:
        raise ValueError("divided or raised by a variable")
    number = right.get((), Fraction(0))
    if isinstance(node.op, ast.Div) and number:
        return {powers: factor / number for powers, factor in left.items()}
    if isinstance(node.op, ast.Pow) and number.denominator == 1 and 0 <= number <= _MAX_DEGREE:
        result: Polynomial = {(): Fraction(1)}
        for _ in range(int(number)):
            result = _product(result, left)
        return result
    raise ValueError("no polynomial")


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for powers, factor in left.items():
        for others, other in right.items():
            exponents = dict(powers)
            for name, exponent in others:
                exponents[name] = exponents.get(name, 0) + exponent
            key = tuple(sorted(exponents.items()))
            result[key] = result.get(key, Fraction(0)) + factor * other
    return _tidy(result)


def _tidy(terms: Polynomial) -> Polynomial:
    terms = {key: factor for key, factor in terms.items() if factor}
    if len(terms) > _MAX_TERMS or any(
        max(abs(factor.numerator), factor.denominator) > 10**300 or sum(e for _, e in key) > _MAX_DEGREE
        for key, factor in terms.items()
    ):
        raise ValueError("too big")
    return terms


def arithmetic(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Uses exactly these numbers, each once, with + - * / and brackets, and gives the target."""
    if not re.fullmatch(r"[\d\s+*/()-]*", answer, re.ASCII) or "**" in answer:
        return False
    used = sorted(map(int, re.findall(r"\d{1,50}", answer)))
    return used == sorted(numbers) and polynomial(answer) == {(): Fraction(target)}


def _integral(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """A polynomial whose derivative is the integrand."""
    variable = metadata["variable"]
    derivative: Polynomial = {}
    for powers, factor in polynomial(answer, (variable, "C")).items():
        exponents = dict(powers)
        if exponents.keys() > {"C"}:
            raise ValueError("the constant is no factor")
        if exponent := exponents.get(variable):
            key = ((variable, exponent - 1),) if exponent > 1 else ()
            derivative[key] = derivative.get(key, Fraction(0)) + factor * exponent
    return derivative == polynomial(metadata["integrand"], (variable,))


def _product_of_polynomials(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """The product multiplied out: a sum without brackets, as the question asks, equal to the gold answer."""
    variables = metadata["variables"]
    return "(" not in answer and polynomial(answer, variables) == polynomial(gold, variables)


def _number(text: str) -> Fraction:
    text = text.replace(",", "").strip()
    if not _NUMBER.fullmatch(text):
        raise ValueError("no number")
    return Fraction(text)


def _probability(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    right = _number(gold)  # the library allows 1/10,000 also where the answer is less than that
    return abs(_number(answer) - right) <= min(Fraction(1, 10_000), abs(right) / 100)


def _exact_number(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    return _number(answer) == _number(gold)


def _integer(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    return len(answer) < 200 and int(answer, 0) == int(gold, 0)


def _numbers(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    def read(text: str) -> list[Fraction]:
        parts = text.strip().removeprefix("[").removesuffix("]").split(",")
        return [_number(part.strip().strip("'\"")) for part in parts]

    return read(answer) == read(gold)


def _complex(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """Real and imaginary part equal to within 1e-6, written like 1.5 - 2i, 3 or -i."""

    def read(text: str) -> tuple[Fraction, Fraction]:
        text = re.sub(r"\s", "", text).replace("j", "i")
        match = re.fullmatch(r"([-+]?[\d.]+(?![\d.]*i))?(?:([-+]?)([\d.]*)i)?", text)
        if match is None or not text:
            raise ValueError("no complex number")
        real, sign, imaginary = match.groups()
        part = Fraction(0) if sign is None else Fraction((sign or "") + (imaginary or "1"))
        return Fraction(real or 0), part

    return all(abs(one - other) <= Fraction(1, 10**6) for one, other in zip(read(answer), read(gold)))


def _text(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """Equal but for the blanks at the ends of lines."""
    return tidy_lines(answer) == tidy_lines(gold)


def _queens(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    return tidy_lines(answer) in map(tidy_lines, metadata["valid_answers"])


def _moves(answer: str, gold: str, metadata: Mapping[str, Any]) -> bool:
    """Nothing but moves: the library plays whatever letters of a text are moves."""
    return re.fullmatch(r"[UDLR\s]+", answer) is not None


def tidy_lines(text: str) -> str:
    """Without blanks at both ends and at the end of each line."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


FIRST: Mapping[str, Callable[[str, str, Mapping[str, Any]], bool]] = {"sokoban": _moves}  # before the library's scorer
CHECKS: Mapping[str, Callable[[str, str, Mapping[str, Any]], bool]] = {
    "arc_agi": _text,
    "binary_matrix": _text,
    "bitwise_arithmetic": _integer,
    "coin_flip": _probability,
    "complex_arithmetic": _complex,
    "countdown": lambda answer, gold, metadata: arithmetic(answer, metadata["numbers"], metadata["target"]),
    "game_of_life_halting": _text,
    "gsm_symbolic": _exact_number,
    "n_queens": _queens,
    "number_sorting": _numbers,
    "polynomial_multiplication": _product_of_polynomials,
    "puzzle24": lambda answer, gold, metadata: arithmetic(answer, metadata["numbers"], 24),
    "rearc": _text,
    "simple_integration": _integral,
    "spiral_matrix": _text,
    "string_insertion": _text,
}
