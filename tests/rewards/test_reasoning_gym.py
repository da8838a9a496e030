"""reasoning_gym: holes of the library's scorers stay shut, gold answers get 1, and model text is never run."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="reasoning_gym needs reasoning-gym")

from rewards import RewardInput, Status, build_rewards
from rewards.gym_checks import CHECKS, arithmetic, polynomial
from rewards.gym_grader import make
from rewards.reasoning_gym import GUESSABLE, OPEN, REFUSED, _verdict, answer_of
from rewards.worker import Answer

SAMPLE = (
    "arc_agi",
    "countdown",
    "letter_jumble",
    "palindrome_generation",
    "prime_factorization",
    "spell_backward",
    "sudoku",
)
CONSTANTS = ("0", "1", "yes", "True", "A", "", "   ", "nan", "[]", "4*6*1*1")


@pytest.fixture(scope="module")
def rewards():
    with build_rewards({"reasoning_gym": {"guessable": True, "timeout": 5}}) as built:
        yield built


def rows(name, size=40):
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=size, seed=11)
    return [dataset[place] for place in range(size)]


def values(rewards, row, *answers):
    scores = rewards.score([RewardInput("q", f"<answer>{answer}</answer>", row) for answer in answers])
    return [score.value for score in scores]


@pytest.mark.parametrize("name", SAMPLE)
def test_constants_get_nothing_and_gold_gets_1(rewards, name):
    inputs = [
        RewardInput("q", f"<answer>{answer}</answer>", row)
        for row in rows(name)
        for answer in (*CONSTANTS, row["answer"], f"\n{row['answer']}  ")
    ]
    scores = [score.value for score in rewards.score(inputs)]
    width = len(CONSTANTS) + 2
    for place, constant in enumerate(CONSTANTS):
        assert sum(scores[place::width]) / 40 <= 0.011, constant
    assert set(scores[width - 2 :: width]) == set(scores[width - 1 :: width]) == {1.0}
    assert name in OPEN


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_gold_passes_our_own_checks(name):
    grade = make(name)
    for row in rows(name, 5):
        assert grade({"answer": f" {row['answer']}", "gold": row["answer"], "metadata": row["metadata"]}) == (1.0, "")
        assert grade({"answer": "junk", "gold": row["answer"], "metadata": row["metadata"]})[0] == 0.0


def test_the_known_holes_are_shut(rewards):
    """The library pays 1.0 for each of these answers."""
    halting = {"answer": "False", "metadata": {"source_dataset": "game_of_life_halting"}}
    assert values(rewards, halting, "anything", "True", "False") == [0.0, 0.0, 1.0]
    coin = {"answer": "0.375", "metadata": {"source_dataset": "coin_flip"}}
    assert values(rewards, coin, "0", "0.3", "0.375", "3/8", "0.37504", "3/0", "nan") == [0, 0, 1, 1, 1, 0, 0]
    assert values(rewards, {**coin, "answer": "0.00003"}, "0", "3e-5", "0.0001") == [0, 1, 0]
    game = {"answer": "4*8 - 6 - 2", "metadata": {"source_dataset": "puzzle24", "numbers": [4, 8, 6, 2]}}
    assert values(rewards, game, "4*6*1*1", "24", "8*4-(6+2)", "8*4-6-2+0", "4*8-6-2 = 24") == [0, 0, 1, 0, 0]
    complex_row = {"answer": "8.0 + 3.0i", "metadata": {"source_dataset": "complex_arithmetic", "result": [8.0, 3.0]}}
    assert values(rewards, complex_row, "nan", "8+3i", "8 - 3i", "8.0+3.0j", "3i", "8") == [0, 1, 0, 1, 0, 0]
    integral = {
        "answer": "x**3 + C",
        "metadata": {"source_dataset": "simple_integration", "integrand": "3*x**2", "variable": "x"},
    }
    tried = ("Integral(3*x**2, x)", "C + x*x*x", "x**3 + 5", "x**3 + x", "3*x**2", "x**3 + C*x")
    assert values(rewards, integral, *tried) == [0, 1, 1, 0, 0, 0]
    numbers = {"answer": "['1.5', '2.0']", "metadata": {"source_dataset": "number_sorting", "direction": "ascending"}}
    assert values(rewards, numbers, "[NaN, NaN]", "[2.4, 2.5]", "[1.5, 2]", "[2.0, 1.5]") == [0, 0, 1, 0]


def test_only_moves_are_played():
    level = "+ + + + +\n+ * @ X +\n+ + + + +"
    item = {"gold": "R", "metadata": {"gamestr": level}}
    grade = make("sokoban")
    assert grade({**item, "answer": " RL "}) == (1.0, "")
    assert grade({**item, "answer": "Run to the Left, Up, Down"}) == (0.0, "")


def test_several_right_answers_are_taken(rewards):
    ladder = {
        "answer": "COLD,CORD,CARD",
        "metadata": {"source_dataset": "word_ladder", "start_word": "COLD", "end_word": "CARD"},
    }
    assert values(rewards, ladder, "cold, cord, card", "COLD,CARD") == [1.0, 0.0]
    chain = {"answer": "1234", "metadata": {"source_dataset": "chain_sum"}}
    assert values(rewards, chain, "+1,234.00", "1234 or 12", "1235") == [1.0, 0.0, 0.0]
    count = {"answer": "28*3 - 1", "metadata": {"source_dataset": "countdown", "numbers": [1, 3, 28], "target": 83}}
    assert values(rewards, count, "3*28-1", "83", "3*28-1*1", "28*3-1 ") == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "name",
    ["binary_matrix", "spiral_matrix", "string_insertion", "n_queens", "puzzle24", "countdown", "simple_integration",
     "polynomial_multiplication", "number_sorting", "bitwise_arithmetic"],
)  # fmt: skip
def test_an_answer_is_never_run(name, tmp_path):
    """The library evaluates the answer (or the row) as Python on these data sets."""
    mark = tmp_path / "owned"
    [row] = rows(name, 1)
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    grade = make(name)
    assert grade({"answer": code, "gold": row["answer"], "metadata": row["metadata"]})[0] == 0.0
    poisoned = {**row["metadata"], "problem": code, "integrand": code}
    for gold in (row["answer"], code):
        verdict = grade({"answer": "1", "gold": gold, "metadata": poisoned})
        assert verdict is None or verdict[0] == 0.0
    assert not mark.exists()


def test_junk_that_makes_the_scorer_raise_is_wrong_and_a_gold_that_fails_is_told(rewards):
    good = {"answer": "2 \u00d7 3", "metadata": {"source_dataset": "prime_factorization"}}
    [score] = rewards.score([RewardInput("q", "<answer>two times three</answer>", good)])
    assert score.value == 0.0 and "ValueError" in score.info["reasoning_gym"]["reason"]
    for gold in ("two times three", "", None):
        [score] = rewards.score([RewardInput("q", "<answer>2</answer>", {**good, "answer": gold})])
        assert (score.value, score.status) == (None, Status.UNPARSEABLE_GOLD)


def test_a_slow_answer_is_wrong_if_the_gold_answer_passes_in_time():
    slow, right, unread = Answer(Status.TIMEOUT, reason="slow"), Answer(Status.OK, [1.0, ""]), Answer(Status.OK)
    assert (_verdict(slow, right).value, _verdict(slow, right).info["timed_out"]) == (0.0, True)
    assert _verdict(slow, unread).status is Status.UNPARSEABLE_GOLD
    assert _verdict(slow, slow).status is Status.TIMEOUT
    assert _verdict(Answer(Status.ERROR, reason="died"), Answer(Status.ERROR)).status is Status.ERROR


@pytest.mark.parametrize("name", [*sorted(REFUSED), "coin_toss"])
def test_refused_data_sets_are_named_before_the_run_and_never_score_0(rewards, name):
    row = {"answer": "1", "metadata": {"source_dataset": name}}
    with pytest.raises(ValueError, match=rf"rewards\.reasoning_gym: source_dataset '{name}' is refused: [^\n]+$"):
        rewards.check(row)
    [score] = rewards.score([RewardInput("q", "<answer>1</answer>", row)])
    assert (score.value, score.status) == (None, Status.ERROR)


def test_guessable_data_sets_want_a_word(rewards):
    assert {"game_of_life_halting", "syllogism", "coin_flip", "course_schedule", "gcd"} <= GUESSABLE
    row = {"answer": "Yes", "metadata": {"source_dataset": "syllogism"}}
    rewards.check(row)
    with build_rewards({"reasoning_gym": 1.0}) as careful, pytest.raises(ValueError, match="guessable: true"):
        careful.check(row)


@pytest.mark.parametrize(
    ("completion", "whole", "expected"),
    [
        (r"<answer>1</answer> \boxed{2} <answer>3</answer>", False, "3"),
        (r"\boxed{2} so \boxed{3}", False, "3"),
        (r"<think><answer>1</answer></think> \boxed{3}", False, "3"),
        ("<answer>1", False, None),
        ("3", False, None),
        ("<think>1</think>3", True, "3"),
    ],
)
def test_where_the_answer_is(completion, whole, expected):
    assert answer_of(completion, whole) == expected


def test_whole_text(rewards):
    row = {"answer": "7", "metadata": {"source_dataset": "chain_sum"}}
    assert rewards.score([RewardInput("q", "7", row)])[0].value == 0.0
    with build_rewards({"reasoning_gym": {"whole_text": True}}) as lenient:
        assert lenient.score([RewardInput("q", " 7\n", row)])[0].value == 1.0


def test_rows_come_as_json_with_values_of_any_type_or_not_at_all(rewards):
    metadata = {"source_dataset": "gsm_symbolic", "half": Fraction(1, 2), 3: {4, 5}, "path": Path("a")}
    row = {"answer": "12", "metadata": metadata}
    assert values(rewards, row, "12.0", "13") == [1.0, 0.0]
    as_text = {"answer": "12", "metadata": json.dumps({"source_dataset": "gsm_symbolic"})}
    assert values(rewards, as_text, "12.0", "13") == [1.0, 0.0]
    for bad in ({}, "text", None, {"source_dataset": 3}):
        with pytest.raises(ValueError, match="names no source_dataset"):
            rewards.check({"answer": "1", "metadata": bad})


def test_rows_of_a_task_have_what_the_reward_needs(rewards):
    from grpo.config import DataConfig
    from grpo.sources import load_rows

    train, held_out = load_rows(DataConfig(task="gsm_symbolic", size=20))
    fields = [{**row.columns, "answer": row.columns["answer"]} for row in [*train, *held_out]]
    for row in fields:
        rewards.check(row)
    golds = [RewardInput("q", f"<answer>{float(row['answer'])}</answer>", row) for row in fields]
    assert {score.value for score in rewards.score(golds)} == {1.0}


def test_polynomials_in_numbers():
    x = lambda power: (("x", power),)  # noqa: E731
    assert polynomial("-(x + 1)**2/2 + 0.5", ("x",)) == {x(2): Fraction(-1, 2), x(1): Fraction(-1)}
    assert polynomial("x*y - y*x", ("x", "y")) == {}
    assert arithmetic("(1+2)/3", [1, 2, 3], 1) and not arithmetic("12/3", [1, 2, 3], 4)
    bad = ["y", "x**-1", "1/x", "x**x", "1/0", "(x+1)**10**9", "9**9**9", "x(1)", "f'1'", "x.real", "[1]", "lambda: 1",
           "", "(" * 900 + "x" + ")" * 900, "-" * 1900 + "x", "+".join("x" * 900), "(x+1)**200*(x+1)"]  # fmt: skip
    for text in bad:
        with pytest.raises(ValueError):
            polynomial(text, ("x",))


@pytest.mark.parametrize(("options", "word"), [({"whole_text": 1}, "whole_text"), ({"guessable": "no"}, "guessable")])
def test_bad_options(options, word):
    with pytest.raises(ValueError, match=rf"rewards\.reasoning_gym\.{word}"):
        build_rewards({"reasoning_gym": options})
