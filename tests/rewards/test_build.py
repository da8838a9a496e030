"""The mapping, weights, gates, statuses of totals, the data check and the circuit breaker."""

import math

import pytest

from rewards import RewardFailure, RewardInput, Score, Status, build_rewards, error_share, raise_if_failing
from rewards.build import REGISTRY
from rewards.compose import Part, Rewards
from rewards.rule import Rule, each
from rewards.worker import WorkerPool


def fixed(name_to_verdict, weights=None, gates=None):
    """Rewards whose parts say what the table says."""
    parts = {}
    for name, verdict in name_to_verdict.items():
        score = verdict if isinstance(verdict, Score | float) or verdict is None else Score(None, verdict)
        parts[name] = Part(Rule(each(lambda _, s=score: s)), (weights or {}).get(name, 1.0), (gates or {}).get(name))
    return Rewards(parts, WorkerPool(), 0.05)


def total(*args, **options):
    [score] = fixed(*args, **options).score([RewardInput("q", "c")])
    return score


def test_weights_parts_and_info():
    mapping = {"exact_match": 1.0, "format_tags": {"weight": 0.2, "tags": ["answer"]}}
    rewards = build_rewards(mapping)
    inputs = [RewardInput("q", text, {"answer": "42"}) for text in ("<answer>42</answer>", "<answer>41</answer>", "")]
    scores = rewards.score(inputs)
    assert [score.value for score in scores] == pytest.approx([1.2, 0.2, 0.0])
    assert scores[1].parts == {"exact_match": 0.0, "format_tags": 1.0}
    assert scores[1].info["exact_match"]["status"] == "ok"
    assert rewards.weights == {"exact_match": 1.0, "format_tags": 0.2}
    assert rewards.score([]) == []


@pytest.mark.parametrize(
    ("mapping", "highest"),
    [
        ({"exact_match": 1.0, "format_tags": {"weight": 0.1, "tags": ["answer"]}}, 1.1),
        ({"exact_match": 0.5, "length": {"weight": 2.0, "max": 4}}, 0.5),
        ({"exact_match": 0.5, "length": {"weight": -2.0, "max": 4}}, 2.5),  # longer is better
        ({"math_answer": 1.0, "soft_overlong": {"weight": 1.0, "max_completion_length": 8, "cache": 2}}, 1.0),
        ({"exact_match": 1.0, "mine": {}}, math.inf),  # a user's function may give anything
        ({"exact_match": 1.0, "mine": {"weight": 0}}, 1.0),  # only watched
    ],
)
def test_the_highest_total(mapping, highest, tmp_path):
    (tmp_path / "mine.py").write_text("def fn(completion, prompt):\n    return 7.0\n")
    if "mine" in mapping:
        mapping = mapping | {"mine": mapping["mine"] | {"function": f"{tmp_path / 'mine.py'}:fn"}}
    with build_rewards(mapping) as rewards:
        assert rewards.highest() == pytest.approx(highest)


def test_what_does_not_apply_is_left_out():
    score = total({"a": 0.5, "b": None})
    assert (score.value, score.parts) == (0.5, {"a": 0.5, "b": None})
    assert total({"a": None, "b": None}).status is Status.NOT_APPLICABLE


@pytest.mark.parametrize("status", [Status.ERROR, Status.TIMEOUT, Status.UNPARSEABLE_GOLD])
def test_a_failed_part_leaves_no_total_instead_of_a_lower_one(status):
    score = total({"a": 1.0, "b": status})
    assert (score.value, score.status) == (None, status)
    assert score.parts == {"a": 1.0, "b": None}


def test_the_worst_status_wins():
    assert total({"a": Status.TIMEOUT, "b": Status.ERROR, "c": None}).status is Status.ERROR
    assert total({"a": Status.UNPARSEABLE_GOLD, "b": Status.TIMEOUT}).status is Status.TIMEOUT
    assert total({"a": Status.UNPARSEABLE_GOLD, "b": None}).status is Status.UNPARSEABLE_GOLD


def test_a_part_of_weight_zero_is_only_watched():
    score = total({"a": 1.0, "b": Status.ERROR}, weights={"b": 0.0})
    assert (score.value, score.info["b"]["status"]) == (1.0, "error")


def test_gates():
    gates = {"brief": "right"}
    assert total({"right": 1.0, "brief": -0.25}, gates=gates).value == 0.75
    shut = total({"right": 0.0, "brief": -0.25}, gates=gates)
    assert (shut.value, shut.parts["brief"], shut.info["brief"]["gate"]) == (0.0, -0.25, "shut")
    assert total({"right": 0.0, "brief": Status.ERROR}, gates=gates).value == 0.0
    assert total({"right": 1.0, "brief": Status.ERROR}, gates=gates).value is None
    assert total({"right": Status.ERROR, "brief": 1.0}, weights={"right": 0.0}, gates=gates).status is Status.ERROR
    assert total({"right": None, "brief": 1.0, "other": 0.5}, gates=gates).value == 0.5


def test_needs_and_check():
    rewards = build_rewards({"exact_match": 1.0, "length": {"weight": 0.1, "max": 10}})
    assert rewards.needs() == {"answer"}
    rewards.check({"answer", "topic"})
    with pytest.raises(ValueError, match=r"rewards.exact_match .*'answer'.*solution"):
        rewards.check(["solution"])
    [score] = rewards.score([RewardInput("q", "c", {}, completion_ids=[1])])
    assert score.status is Status.ERROR and "answer" in score.info["exact_match"]["reason"]


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"math_anwser": 1.0}, ["math_anwser", "did you mean 'math_answer'"]),
        ({"zzz": 1.0}, ["zzz", "known", "function"]),
        ({"format_tags": {"tagz": ["a"]}}, ["format_tags.tagz", "did you mean 'tags'"]),
        ({"math_answer": {"timout": 1}}, ["math_answer.timout", "did you mean 'timeout'"]),
        ({"math_answer": {"pool": 1}}, ["math_answer.pool"]),
        ({"math_answer": {"timeout": 0}}, ["math_answer.timeout", "0"]),
        ({"exact_match": {"weight": "high"}}, ["exact_match.weight", "high"]),
        ({"exact_match": {"weight": float("nan")}}, ["exact_match.weight", "nan"]),
        ({"exact_match": True}, ["exact_match.weight", "True"]),
        ({"exact_match": {"timeout": 2}}, ["exact_match.timeout"]),
        ({"exact_match": 0.0}, ["weight", "0"]),
        ({"soft_overlong": {"cache": 5}}, ["soft_overlong", "max_completion_length"]),
        ({"exact_match": 1.0, "format_tags": {"gated_by": "exact_mach"}}, ["gated_by", "did you mean 'exact_match'"]),
        ({"exact_match": {"gated_by": "exact_match"}}, ["gated_by"]),
        ({"exact_match": {"function": "a:b"}}, ["exact_match", "built in"]),
        ({}, ["rewards"]),
    ],
)
def test_bad_mappings_are_one_clear_line(mapping, words):
    if "math_answer" in mapping:
        pytest.importorskip("math_verify")
    with pytest.raises(ValueError) as caught:
        build_rewards(mapping)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_circuit_breaker():
    good, bad = Score(1.0), Score(None, Status.ERROR, info={"judge": {"status": "error", "reason": "HTTP 502"}})
    assert error_share([good, bad]) == 0.5 and error_share([]) == 0.0
    raise_if_failing([good, good, bad], 0.05)  # one bad sample among few must not stop a run
    raise_if_failing([bad, bad] + [good] * 98, 0.05)
    with pytest.raises(RewardFailure, match=r"2 of 10 .*judge: HTTP 502"):
        raise_if_failing([bad, bad] + [good] * 8, 0.05)


def test_every_registered_reward_resolves_and_documents_itself():
    import importlib

    for target in REGISTRY.values():
        module, _, name = target.partition(":")
        assert getattr(importlib.import_module(module), name).__doc__


def test_clip_bounds_what_counts_and_leaves_the_part_as_it_is():
    mapping = {"exact_match": 1.0, "length": {"weight": 2.0, "max": 10, "clip": [-0.3, 0]}}
    with build_rewards(mapping) as rewards:
        [score] = rewards.score([RewardInput("q", "<answer>1</answer>", {"answer": "1"}, completion_ids=range(8))])
        assert score.parts["length"] == pytest.approx(-0.8) and score.terms["length"] == pytest.approx(-0.3)
        assert score.value == pytest.approx(1 - 2 * 0.3)
        assert rewards.highest() == pytest.approx(1.0)


def test_rows_are_routed_by_a_column():
    mapping = {
        "exact_match": {"weight": 1.0, "when": {"task": ["sum", "product"]}},
        "words": {"kind": "format_tags", "tags": ["poem"], "weight": 0.5, "when": {"task": "poem"}},
    }
    with build_rewards(mapping) as rewards:
        assert rewards.needs() == {"answer", "task"}
        rewards.check({"task": "poem"})  # a row that needs no answer
        with pytest.raises(ValueError, match="exact_match needs the data field 'answer'"):
            rewards.check({"task": "sum"})
        with pytest.raises(ValueError, match=r"exact_match\.when names the column 'task'"):
            rewards.check({"answer": "1"})
        scores = rewards.score(
            [
                RewardInput("q", "<answer>1</answer>", {"answer": "1", "task": "sum"}),
                RewardInput("q", "<poem>oh</poem>", {"task": "poem"}),
                RewardInput("q", "<poem>oh</poem>", {"task": "chess"}),
            ]
        )
    assert [score.value for score in scores] == [1.0, 0.5, None]
    assert scores[2].status is Status.NOT_APPLICABLE
    assert scores[1].terms == {"exact_match": None, "words": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": [1]}, r"rewards.exact_match.clip is \[1\]; give \[lowest, highest\]"),
        ({"clip": [1, 0]}, "the first number is the lowest"),
        ({"when": "task"}, "rewards.exact_match.when is 'task'; give a mapping"),
        ({"kind": "exact_mach"}, r"rewards\.exact_match\.kind is 'exact_mach', did you mean 'exact_match'"),
    ],
)
def test_bad_composition_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_rewards({"exact_match": {"weight": 1.0, **options}})


def test_the_cache_asks_once_and_never_keeps_a_failure(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pathlib\n"
        "def fn(completion, prompt):\n"
        f"    log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "    log.write_text((log.read_text() if log.exists() else '') + completion)\n"
        "    return 1 / int(completion)\n"
    )
    mapping = {"mine": {"function": f"{tmp_path / 'mine.py'}:fn"}}
    inputs = [RewardInput("q", text) for text in ("2", "0", "2", "4")]
    for _ in range(2):
        with build_rewards(mapping, workers=1, cache=tmp_path / "cache.db") as rewards:
            assert [score.value for score in rewards.score(inputs)] == [0.5, None, 0.5, 0.25]
    assert sorted((tmp_path / "log").read_text()) == ["0", "0", "2", "4"]
    with pytest.raises(ValueError, match="reward cache"):
        build_rewards(mapping, cache=tmp_path / "mine.py")
