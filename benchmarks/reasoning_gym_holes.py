"""What reasoning-gym's scorers pay for nothing, before and after our closing. Writes results/reasoning_gym_holes.json.

    python -m benchmarks.reasoning_gym_holes

The peer is the library's own `score_answer`. For each data set, on rows drawn with its default options: what constants
and junk get on average, whether every gold answer gets 1, on how many rows the commonest gold answer is right, and
what the scorer raises. Then the same through the reasoning_gym reward, guessable data sets included. A constant that
is the gold answer of a row is paid there by right: `paid_wrong` counts only rows where it is not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import machine, versions, write_result
from rewards import RewardInput, build_rewards
from rewards.reasoning_gym import GUESSABLE, REFUSED

CLAIM = (
    "On data sets taken by default no constant gets more than 0.011 where it is wrong, nor more than 0.02 by being "
    "right now and then, and every gold answer gets 1."
)
ROWS, SEED, LIMIT = 100, 20250120, 0.011
LUCK = 0.02
FEWER = {"futoshiki": 20, "knight_swap": 20, "intermediate_integration": 5}  # slow to draw or to score
NUMBERS = (
    "basic_arithmetic",
    "rearc",
    "chain_sum",
    "count_primes",
    "gsm_symbolic",
    "simple_equations",
    "simple_geometry",
    "polynomial_multiplication",
)
MORE = dict.fromkeys(NUMBERS, 1000) | {"polynomial_multiplication": 300}  # 0 or 1 is right now and then: how often?
CONSTANTS = (
    "0", "1", "yes", "Yes", "no", "No", "True", "False", "A", "on", "x", "nan", "inf", "[]", "{}", "[[0]]",
    "", "   ", "3*8*9/9", "infeasible",
)  # fmt: skip


def rows_of(name: str) -> list[dict[str, Any]]:
    import reasoning_gym

    count = (FEWER | MORE).get(name, ROWS)
    dataset = reasoning_gym.create_dataset(name, size=count, seed=SEED)
    return [dataset[place] for place in range(count)]


def candidates(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is tried -> one answer a row. Besides constants: the commonest gold, another row's, the question itself."""
    golds = [str(row["answer"]) for row in rows]
    tried = {constant: [constant] * len(rows) for constant in CONSTANTS}
    tried["(commonest gold)"] = [Counter(golds).most_common(1)[0][0]] * len(rows)
    tried["(next row's gold)"] = [*golds[1:], golds[0]]
    tried["(question)"] = [row["question"] for row in rows]
    tried["(question's integral)"] = [
        f"Integral({row['metadata'].get('integrand')}, {row['metadata'].get('variable')})" for row in rows
    ]
    return tried


def paid(
    tried: Mapping[str, Sequence[str]], golds: Sequence[str], values: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Means by what was tried (those above 0), in all and where it is not the gold answer."""
    mean = {what: sum(got) / len(got) for what, got in values.items()}
    wrong = {
        what: sum(value for value, answer, gold in zip(got, tried[what], golds) if not same(answer, gold)) / len(got)
        for what, got in values.items()
    }
    return {"paid": _above_0(mean), "paid_wrong": _above_0(wrong)}


def same(answer: str, gold: str) -> bool:
    """Equal but for case, or equal numbers."""
    try:
        return float(answer) == float(gold)
    except ValueError:
        return answer.strip().lower() == gold.strip().lower()


def _above_0(means: Mapping[str, float]) -> dict[str, float]:
    return {what: round(value, 4) for what, value in means.items() if value > 0}


def library(name: str, rows: Sequence[Mapping[str, Any]], tried: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    import reasoning_gym

    score_answer = reasoning_gym.get_score_answer_fn(name)
    raised = Counter[str]()

    def score(answer: Any, row: Mapping[str, Any]) -> float:
        try:
            return float(score_answer(answer, row))
        except Exception as error:  # what it raises is part of the measurement
            raised[type(error).__name__] += 1
            return 0.0

    values = {what: [score(answer, row) for answer, row in zip(answers, rows)] for what, answers in tried.items()}
    gold = sum(score(row["answer"], row) for row in rows) / len(rows)
    return {**paid(tried, [str(row["answer"]) for row in rows], values), "gold": gold, "raised": dict(raised)}


def ours(rows: Sequence[Mapping[str, Any]], tried: Mapping[str, Sequence[str]], rewards: Any) -> dict[str, Any]:
    without_value = Counter[str]()

    def score(answers: Sequence[str]) -> list[float]:
        inputs = [RewardInput(row["question"], f"<answer>{a}</answer>", row) for a, row in zip(answers, rows)]
        scores = rewards.score(inputs)
        without_value.update(str(score.status) for score in scores if score.value is None)
        return [score.value or 0.0 for score in scores]

    golds = [row["answer"] for row in rows]
    values = {what: score(answers) for what, answers in tried.items()}
    scored = [row for row in golds if row.strip()]  # an empty gold answer has a status, and no value
    return {
        **paid(tried, golds, values),
        "gold": sum(score(golds)) / max(1, len(scored)),
        "empty_golds": len(golds) - len(scored),
        "without_value": dict(without_value),
    }


def measure(name: str, rewards: Any) -> dict[str, Any]:
    rows = rows_of(name)
    tried = candidates(rows)
    commonest = Counter(str(row["answer"]) for row in rows).most_common(1)[0]
    result: dict[str, Any] = {"rows": len(rows), "commonest_gold": [commonest[0][:60], commonest[1] / len(rows)]}
    result["library"] = library(name, rows, tried)
    result["taken"] = "refused" if name in REFUSED else "guessable" if name in GUESSABLE else "yes"
    if name not in REFUSED:
        result["ours"] = ours(rows, tried, rewards)
    return result


def main() -> None:
    from reasoning_gym.factory import DATASETS

    before = machine()
    results: dict[str, Any] = {}
    with build_rewards({"reasoning_gym": {"guessable": True, "timeout": 10.0}}) as rewards:
        for name in sorted(DATASETS.keys() - {"composite"}):
            results[name] = measure(name, rewards)
            print(name, json.dumps(results[name], ensure_ascii=False)[:400], flush=True)
    print(
        write_result(
            "reasoning_gym_holes", CLAIM, before, summary(results) | versions("reasoning-gym") | {"data_sets": results}
        )
    )


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    def most(result: Mapping[str, Any], side: str, key: str) -> float:
        """The most that a constant got."""
        return max((value for what, value in result[side][key].items() if what in CONSTANTS), default=0.0)

    def names(of: Mapping[str, Any], side: str, key: str, limit: float) -> list[str]:
        return sorted(name for name, result in of.items() if most(result, side, key) > limit)

    taken = {name: result for name, result in results.items() if result["taken"] != "refused"}
    default = {name: result for name, result in taken.items() if result["taken"] == "yes"}
    return {
        "data_sets_measured": len(results),
        "refused": sorted(REFUSED),
        "guessable": sorted(GUESSABLE),
        "taken_by_default": len(default),
        "library_pays_a_constant": names(results, "library", "paid", LIMIT),
        "library_pays_a_constant_where_it_is_wrong": names(results, "library", "paid_wrong", LIMIT),
        "library_raises": sorted(name for name, result in results.items() if result["library"]["raised"]),
        "library_gold_below_1": sorted(name for name, result in results.items() if result["library"]["gold"] < 1),
        "ours_pays_a_constant_where_it_is_wrong": names(taken, "ours", "paid_wrong", LIMIT),
        "ours_most_paid_where_wrong": max(most(result, "ours", "paid_wrong") for result in taken.values()),
        "ours_pays_a_constant_by_luck": names(default, "ours", "paid", LUCK),
        "ours_most_paid_by_default": max(most(result, "ours", "paid") for result in default.values()),
        "ours_gold_below_1": sorted(name for name, result in taken.items() if result["ours"]["gold"] < 1),
    }


if __name__ == "__main__":
    main()
