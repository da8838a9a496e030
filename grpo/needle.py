"""The needle task: short facts hidden in filler text, each asked about once, somewhere after it.

    ... the sky <G1> is blue the <A3> sea is deep ?A<A3> the sun is warm ... ?G<G1>

A needle <A3> is a key and a value; a question is `?` and a key, its answer the needle again. A text hides one needle
of each key and ends with a question, which a prompt leaves open. Every text is a function of a seed and its number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

KEYS = "ABCDEFGH"
VALUES = "0123456789"
FILLER = "the sky is blue the sea is deep the sun is warm the hill is green "
OPTIONS = {"length": 128}


class Needle(NamedTuple):
    """A text that ends with a question, its answer, and where in it the needle stands (share of its length)."""

    prompt: str
    answer: str
    depth: float


def make_needle(rng: random.Random, length: int, depth: float | None = None) -> Needle:
    """A text of `length` tokens, the answer included, where a needle is one token and so is any other character.

    `depth`: where the needle of the last question is to stand, as a share of the filler; None: anywhere. Raises
    ValueError for a length that leaves no room for filler.
    """
    keys = rng.sample(KEYS, len(KEYS))
    needles = [f"<{key}{rng.choice(VALUES)}>" for key in keys]
    room = length - len(KEYS) * (len(" n") + len(" ?kn"))
    if room < len(FILLER):
        raise ValueError(
            f"length {length} is too short for {len(KEYS)} needles with their questions; "
            f"it must be at least {length - room + len(FILLER)}"
        )
    start = rng.randrange(len(FILLER))
    filler = (FILLER * (room // len(FILLER) + 2))[start : start + room]
    gaps = [place for place, character in enumerate(filler) if character == " "]
    last = gaps[min(int((rng.random() if depth is None else depth) * len(gaps)), len(gaps) - 1)]
    # (gap, 0 needle or 1 question, a random order within a gap, text, tokens): a question comes after its needle
    events = [(last, 0, rng.random(), f" {needles[-1]}", 2)]
    for key, needle in zip(keys[:-1], needles):
        hidden, asked = sorted(rng.choices(gaps, k=2))
        events += [(hidden, 0, rng.random(), f" {needle}", 2), (asked, 1, rng.random(), f" ?{key}{needle}", 4)]
    pieces, place, tokens, found = [], 0, 0, 0
    for gap, _, _, text, size in sorted(events):
        pieces += [filler[place:gap], text]
        tokens += gap - place + size
        place = gap
        if text == f" {needles[-1]}":
            found = tokens - 1
    prompt = "".join([*pieces, filler[place:], f" ?{keys[-1]}"])
    return Needle(prompt, needles[-1], found / length)


def needle_rows(size: int, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`size` rows with the columns text, prompt, answer, depth. Raises ValueError for options that do not fit."""
    given = {**OPTIONS, **options}
    if set(given) != set(OPTIONS) or type(given["length"]) is not int:
        raise ValueError("the one option is length, a number of tokens")
    needles = (make_needle(random.Random(f"{seed}/{number}"), **given) for number in range(size))
    return [{"text": needle.prompt + needle.answer, **needle._asdict()} for needle in needles]
