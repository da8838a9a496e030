"""json_schema: where the JSON is, what validates, and schemas and texts that would hang or crash the grader."""

import json
import time

import pytest

from rewards import RewardInput, Status, build_rewards

pytest.importorskip("jsonschema", reason="json_schema needs jsonschema")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
RIGHT = [
    '{"name": "Ada", "age": 36}',
    ' \n{"age": 36, "name": "Ada"}\n',
    '```json\n{"name": "Ada", "age": 36}\n```',
    'Here it is:\n```\n{"name": "Ada", "age": 36}\n```\nI hope it helps.',
    '```json\n{}\n```\nno:\n```json\n{"name": "Ada", "age": 36}\n```',
    '<think>```json\n[]\n```</think>{"name": "Ada", "age": 36}',
    '<think>hm</think><answer>{"name": "Ada", "age": 36}</answer>',
]
WRONG = [
    "",
    "{}",
    "[]",
    "null",
    '{"name": "Ada", "age": -1}',
    '{"name": "Ada", "age": "36"}',
    '{"name": "Ada", "age": 36, "more": 1}',
    '{"name": "Ada", "age": 36',
    '{"name": "Ada", "age": NaN}',
    "{'name': 'Ada', 'age': 36}",
    'Here: {"name": "Ada", "age": 36}',
    '```python\n{"name": "Ada", "age": 36}\n```',
    '<think>{"name": "Ada", "age": 36}</think>',
    "[" * 100_000,
    '{"name":' * 50_000,
]


@pytest.fixture(scope="module")
def rewards():
    with build_rewards({"json_schema": {"schema": SCHEMA, "timeout": 1.0}}) as built:
        yield built


@pytest.fixture(scope="module")
def by_row():
    with build_rewards({"json_schema": {"timeout": 1.0}}) as built:
        yield built


@pytest.mark.parametrize(("texts", "value"), [(RIGHT, 1.0), (WRONG, 0.0)], ids=["right", "wrong"])
def test_table(rewards, texts, value):
    scores = rewards.score([RewardInput("q", text) for text in texts])
    assert [text[:80] for text, score in zip(texts, scores) if score.value != value] == []


def test_the_reason_names_the_place(rewards):
    [score] = rewards.score([RewardInput("q", '{"name": "Ada", "age": "36"}')])
    assert score.info["json_schema"]["reason"] == "$.age: '36' is not of type 'integer'"


def test_rows_bring_their_own_schema(by_row):
    rows = [({"type": "integer"}, "7"), (json.dumps({"type": "string"}), "7"), ({"enum": [7]}, "7")]
    scores = by_row.score([RewardInput("q", text, {"schema": schema}) for schema, text in rows])
    assert [score.value for score in scores] == [1.0, 0.0, 1.0]
    assert by_row.needs() == {"schema"}


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, "{", 7, {"$ref": "#"}, {"$ref": "https://example.com/schema.json"}, {"enum": {1}}]
)
def test_a_schema_at_fault_has_a_status_of_its_own(by_row, schema):
    [score] = by_row.score([RewardInput("q", "7", {"schema": schema})])
    assert (score.value, score.status) == (None, Status.UNPARSEABLE_GOLD)
    assert "schema" in score.info["json_schema"]["reason"]


def test_a_pattern_that_backtracks_costs_its_own_score_only(by_row):
    slow = RewardInput("q", '"' + "a" * 60 + '!"', {"schema": {"type": "string", "pattern": "^(a+)+$"}})
    fine = RewardInput("q", '"aaa"', {"schema": {"type": "string", "pattern": "^(a+)+$"}})
    start = time.monotonic()
    scores = by_row.score([slow, fine, fine])
    assert [score.value for score in scores] == [0.0, 1.0, 1.0]
    assert scores[0].info["json_schema"]["timed_out"] and time.monotonic() - start < 3.0


def test_recursion_of_the_schema_follows_the_text(by_row):
    nest = {"type": "array", "items": {"$ref": "#"}}
    texts = ["[[[]]]", "[" * 300 + "]" * 300, "[[7]]"]
    scores = by_row.score([RewardInput("q", text, {"schema": nest}) for text in texts])
    assert [score.value for score in scores] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, [], {"minimum": "1"}])
def test_a_bad_schema_option_is_one_clear_line(schema):
    with pytest.raises(ValueError, match=r"rewards\.json_schema\.schema") as caught:
        build_rewards({"json_schema": {"schema": schema}})
    assert "\n" not in str(caught.value)
