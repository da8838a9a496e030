"""The reasoning_gym reward: rows of reasoning-gym, scored by the rules of their data set where those can be trusted.

Every data set was measured with constants, junk and its own gold answers (benchmarks/reasoning_gym_holes.py). Holes
are closed by rewards/gym_checks.py and by paying full marks only; the rest is refused by name.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.gym_checks import tidy_lines
from rewards.math_answer import last_boxes
from rewards.records import RewardInput, Score, Status
from rewards.rule import Rule, failure
from rewards.text_rules import last_tagged
from rewards.worker import Answer, WorkerPool

TARGET = "rewards.gym_grader:make"
MEASURED = "0.1.25"  # the version of reasoning-gym

_NO_GOLD = "its rows have no gold answer, so nobody can tell whether its scorer pays a right one"
REFUSED: Mapping[str, str] = {
    "boxnet": _NO_GOLD,
    "graph_color": _NO_GOLD,
    "propositional_logic": "its rows have no gold answer, and its scorer pays for a premise copied from the question",
    "rubiks_cube": _NO_GOLD,
    "rush_hour": _NO_GOLD,
    "intermediate_integration": "its scorer runs the answer as Python, and some gold answers restate the question",
}
_GUESSABLE_NAMES = """
    acre aiw binary_alternation calendar_arithmetic circuit_logic coin_flip count_bits course_schedule
    family_relationships game_of_life game_of_life_halting gcd isomorphic_strings knight_swap largest_island
    letter_counting mahjong_puzzle manipulate_matrix maze number_sequence polynomial_equations power_function
    products ransom_note rectangle_count rotten_oranges self_reference shortest_path syllogism
    zebra_puzzles
"""
_OPEN_NAMES = """
    ab advanced_geometry arc_1d arc_agi base_conversion basic_arithmetic bf binary_matrix bitwise_arithmetic
    caesar_cipher chain_sum codeio color_cube_rotation complex_arithmetic count_primes countdown cryptarithm
    decimal_arithmetic decimal_chain_sum dice emoji_mystery figlet_font fraction_simplification futoshiki
    group_anagrams gsm_symbolic jugs kakurasu knights_knaves lcm leg_counting letter_jumble list_functions
    mini_sudoku modulo_grid n_queens needle_haystack number_filtering number_format number_sorting
    palindrome_generation palindrome_partitioning path_star polynomial_multiplication pool_matrix
    prime_factorization puzzle24 quantum_lock rearc rotate_matrix sentence_reordering simple_equations simple_geometry
    simple_integration sokoban spell_backward spiral_matrix string_insertion string_manipulation
    string_splitting string_synthesis sudoku survo time_intervals tower_of_hanoi tsumego word_ladder
    word_sequence_reversal word_sorting
"""
# Guessable: a bare constant is right on more than 2 % of the rows, or some answer on more than 10 %.
GUESSABLE, OPEN = frozenset(_GUESSABLE_NAMES.split()), frozenset(_OPEN_NAMES.split())


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    gold: str
    metadata: Mapping[str, Any]


def reasoning_gym(*, pool: WorkerPool, timeout: float = 3.0, whole_text: bool = False, guessable: bool = False) -> Rule:
    r"""1.0 if the answer to a row of reasoning-gym gets full marks by its data set's rules, else 0.0.

    A row has fields["answer"] and fields["metadata"] (a mapping, or JSON) with `source_dataset`, as the library and
    `data.task` give them. The answer is what the last <answer> pair holds, else the last \boxed{}, in the text after
    </think>; `whole_text`: else that text; otherwise there is none, which is 0.0. `guessable`: also take data sets on
    which a constant is often right (yes or no questions). More than `timeout` seconds is the answer's doing: 0.0, with
    the reason in info. A gold answer that does not get full marks itself is UNPARSEABLE_GOLD. A row of a data set that
    cannot be scored fairly is an error before the run, and an ERROR here. ValueError: reasoning-gym is not installed,
    or a bad option.
    """
    for option, value in (("whole_text", whole_text), ("guessable", guessable)):
        if not isinstance(value, bool):
            raise ValueError(f"rewards.reasoning_gym.{option} is {value!r}; give true or false")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("rewards.reasoning_gym needs reasoning-gym; pip install 'grpo-v3[tasks]'")
    pool.preload(TARGET, {"name": "chain_sum"})  # the import is what takes time

    def score(inputs: Sequence[RewardInput]) -> list[Score]:
        scores: list[Score | None] = [None] * len(inputs)
        waiting: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for place, sample in enumerate(inputs):
            try:
                row = _row(sample.fields, guessable)
            except ValueError as error:
                scores[place] = failure(Status.ERROR, str(error))
                continue
            answer = answer_of(sample.completion, whole_text)
            if not row.gold.strip():
                scores[place] = failure(Status.UNPARSEABLE_GOLD, "the gold answer is empty")
            elif answer is None or not answer.strip():
                scores[place] = Score(0.0, info={"reason": "no answer"})
            elif tidy_lines(answer) == tidy_lines(row.gold):
                scores[place] = Score(1.0, info={"by": "string"})
            else:
                item = {"answer": answer, "gold": row.gold, "metadata": _plain(row.metadata)}
                waiting.setdefault(row.name, []).append((place, item))
        for name, entries in waiting.items():
            places, items = zip(*entries)
            for place, verdict in zip(places, _verdicts(pool, name, items, timeout), strict=True):
                scores[place] = verdict
        assert all(verdict is not None for verdict in scores)
        return scores  # type: ignore[return-value]

    def check(fields: Mapping[str, Any]) -> None:
        _row(fields, guessable)

    def perfect(fields: Mapping[str, Any]) -> str | None:
        gold = _row(fields, guessable).gold
        return f"<answer>{gold}</answer>" if gold.strip() else None

    needs = frozenset({"answer", "metadata"})
    return Rule(score, needs, (0.0, 1.0), runs="worker", version=MEASURED, perfect=perfect, check=check)


def answer_of(completion: str, whole_text: bool = False) -> str | None:
    r"""What the last <answer> pair after </think> holds, else the last \boxed{}, else the text or None."""
    text = completion.rpartition("</think>")[2]
    tagged = last_tagged(text, "answer")
    if tagged is not None:
        return tagged
    boxes = last_boxes(text)
    return boxes[-1] if boxes else text if whole_text else None


def _row(fields: Mapping[str, Any], guessable: bool) -> _Row:
    metadata = fields["metadata"]
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    name = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(
            f"metadata {fields['metadata']!r:.80} names no source_dataset; "
            "reasoning_gym scores rows of reasoning-gym only"
        )
    if name in REFUSED:
        raise ValueError(f"source_dataset {name!r} is refused: {REFUSED[name]}; use another or a function of your own")
    if name in GUESSABLE and not guessable:
        raise ValueError(
            f"source_dataset {name!r} is refused: a constant answer is often right there; "
            "set guessable: true to take it"
        )
    if name not in GUESSABLE | OPEN:
        raise ValueError(
            f"source_dataset {name!r} is refused: not among those measured with reasoning-gym {MEASURED}; "
            "use another or a function of your own"
        )
    assert isinstance(metadata, Mapping)
    answer = fields["answer"]
    return _Row(name, "" if answer is None else str(answer), metadata)


def _verdicts(pool: WorkerPool, name: str, items: Sequence[Mapping[str, Any]], timeout: float) -> list[Score]:
    answers = pool.run(TARGET, {"name": name}, items, timeout)
    slow = [item for item, answer in zip(items, answers) if answer.status is Status.TIMEOUT]
    golds = [{"gold": item["gold"], "metadata": item["metadata"]} for item in slow]
    gold_checks = iter(pool.run(TARGET, {"name": name}, golds, timeout))
    return [_verdict(answer, next(gold_checks) if answer.status is Status.TIMEOUT else answer) for answer in answers]


def _verdict(answer: Answer, gold_check: Answer) -> Score:
    """The Score of a worker's answer. A timeout is the answer's doing if the gold answer passes in time."""
    queue_s, run_s = answer.queue_s, answer.run_s
    if gold_check.status is Status.OK and gold_check.result is None:
        return failure(Status.UNPARSEABLE_GOLD, "the gold answer does not get full marks itself", queue_s, run_s)
    if answer.status is Status.TIMEOUT and gold_check.status is Status.OK:
        info = {"reason": f"the answer took too long to check: {answer.reason}", "timed_out": True}
        return Score(0.0, info=info, queue_s=queue_s, run_s=run_s)
    if answer.status is not Status.OK:
        return failure(answer.status, answer.reason, queue_s, run_s)
    value, reason = answer.result
    return Score(float(value), info={"reason": reason} if reason else {}, queue_s=queue_s, run_s=run_s)


def _plain(value: Any) -> Any:
    """The value as JSON values; what has no such form (a Fraction) as its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [_plain(entry) for entry in value]
    as_list = getattr(value, "tolist", None)  # numpy's
    return str(value) if as_list is None else _plain(as_list())
