"""The needle task: short facts hidden in filler text, and a question about one of them at the end.

    ... the sky is blue k47 the sea is deep r03 the sun is warm ... ?r03 ?k47

A needle is a key (a letter) and a value (two digits). A question repeats a key after `?`; its answer is the value.
Texts have characters that every tokenizer knows, and are a function of (seed, number of the row) alone.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

KEYS = string.ascii_letters
FILLER = "the sky is blue the sea is deep the sun is warm the hill is green "
DIGITS = 2  # of a value
DEFAULTS = {"length": 128, "spacing": 16, "questions": 8}


class Needle(NamedTuple):
    """A text that ends with a question, its answer, and where in it the needle stands (share of its length)."""

    prompt: str
    answer: str
    depth: float


def make_needle(rng: random.Random, length: int, spacing: int, questions: int, depth: float | None = None) -> Needle:
    """A text of exactly `length` characters, the answer included, with a needle every `spacing` characters.

    The last of the questions is the one that the prompt leaves open; `depth` places its needle (None: anywhere).
    Raises ValueError where the text is too short or has more needles than there are keys.
    """
    count = length // spacing
    if not 1 <= count <= len(KEYS):
        raise ValueError(
            f"length {length} with spacing {spacing} makes {count} needles; there must be 1 to {len(KEYS)}"
        )
    needles = [f"{key}{rng.randrange(10**DIGITS):0{DIGITS}}" for key in rng.sample(KEYS, count)]
    asked = [rng.choice(needles) for _ in range(questions)]
    tail = "".join(f" ?{needle}" for needle in asked)
    room = length - len(tail) - count * (DIGITS + 2)
    start = rng.randrange(len(FILLER))
    filler = (FILLER * (max(room, 0) // len(FILLER) + 2))[start : start + max(room, 0)]
    gaps = [place for place, character in enumerate(filler) if character == " "]
    if len(gaps) < count:
        raise ValueError(
            f"length {length} leaves {max(room, 0)} characters of filler beside {count} needles and {questions} "
            "questions; raise length or spacing, or ask less"
        )
    order = rng.sample(needles, count)
    if depth is not None:
        slot = min(int(depth * count), count - 1)
        other = order.index(asked[-1])
        order[slot], order[other] = order[other], order[slot]
    pieces, before = [], 0
    for gap, needle in zip(sorted(rng.sample(gaps, count)), order):
        pieces += [filler[before:gap], " ", needle]
        before = gap
    body = "".join([*pieces, filler[before:]])
    text = body + tail
    return Needle(text[:-DIGITS], text[-DIGITS:], body.index(f" {asked[-1]}") / length)


def needle_rows(size: int, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`size` rows with the columns text, prompt, answer, depth. Raises ValueError for options that do not fit."""
    given = {**DEFAULTS, **options}
    if set(given) != set(DEFAULTS) or not all(type(v) is int and v > 0 for v in given.values()):
        raise ValueError(f"the options are {', '.join(DEFAULTS)}, whole numbers of at least 1")
    rows = []
    for number in range(size):
        needle = make_needle(random.Random(f"{seed}/{number}"), **given)
        rows.append({"text": needle.prompt + needle.answer, **needle._asdict()})
    return rows
