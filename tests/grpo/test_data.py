"""Prompts: rendered and tokenised as asked, a resumed cursor goes on as if never stopped, errors name the row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.config import DataConfig, load_config
from grpo.data import PromptCursor, Row, load_rows, make_prompts, sft_examples, text_blocks

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
CHARACTERS = "0123456789+-= abcdefghijklmnopqrstuvwxyz<>/:#.?"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ids(text: str) -> list[int]:
    """Token ids of the tests' tokenizer: 2 + the place in CHARACTERS."""
    return [2 + CHARACTERS.index(character) for character in text]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token a character; as tokenizers of published models do, it puts a begin token first unless told not to."""
    vocabulary = {"<pad>": 0, "<eos>": 1, **{character: 2 + i for i, character in enumerate(CHARACTERS)}}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))  # leaves out what it does not know
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT)


def rows_of(*columns: dict[str, Any]) -> list[Row]:
    return [Row(f"d.jsonl:{i}", row, f"d.jsonl:{i}") for i, row in enumerate(columns, start=1)]


def error(call: Any, *args: Any, **options: Any) -> str:
    """The ValueError of a call, checked to be one line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert text and "\n" not in text, f"not one line: {text!r}"
    return text


# ---- prompts


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"GSM8K is not at {GSM8K}")
def test_gsm8k_as_published(tokenizer: Any) -> None:
    config = load_config(ROOT / "configs" / "gsm8k.yaml").data.model_copy(
        update={"path": str(GSM8K / "train.jsonl"), "eval_path": str(GSM8K / "test.jsonl"), "max_prompt_length": 0}
    )
    train, held_out = load_rows(config)
    assert (len(train), len(held_out)) == (7473, 256)
    assert train[0].id == "train.jsonl:1" and all(row.id.startswith("eval/test.jsonl:") for row in held_out)
    prompts = make_prompts(train, config, tokenizer)
    assert [prompts[i].fields["answer"] for i in (0, 1, 2)] == ["72", "10", "5"]
    assert [message["role"] for message in prompts[0].text] == ["system", "user"]
    assert all(re.fullmatch(r"-?[\d,.]+", prompt.fields["answer"]) for prompt in prompts)


def test_a_string_is_tokenised_as_it_is(tokenizer: Any) -> None:
    prompt = make_prompts(rows_of({"prompt": "12+3=", "answer": 15, "level": 2}), DataConfig(), tokenizer)[0]
    assert prompt.text == "12+3=" and list(prompt.token_ids) == ids("12+3=")
    assert prompt.fields == {"prompt": "12+3=", "answer": "15", "level": 2}
    assert (prompt.id, prompt.visit) == ("d.jsonl:1", 0)


def test_no_begin_token_is_added_to_a_prompt(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    with_begin = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=CHAT)
    assert with_begin("1=")["input_ids"] == [0, *ids("1=")]
    for option in ({}, {"chat_template": "on"}):
        prompt = make_prompts(rows_of({"prompt": "1=", "answer": 1}), DataConfig(**option), with_begin)[0]
        assert 0 not in prompt.token_ids


def test_chat_prompts_go_through_the_template(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "1+2?"}]
    cases = [
        (chat, {}, "<user>1+2?<assistant>"),
        ("1+2?", {"chat_template": "on"}, "<user>1+2?<assistant>"),
        ("1+2?", {"system_prompt": "be brief"}, "<system>be brief<user>1+2?<assistant>"),
        (chat, {"system_prompt": "be brief"}, "<system>be brief<user>1+2?<assistant>"),
        ("1+2?", {"chat_template": "off"}, "1+2?"),
        ("q: 1+2?", {"prompt_pattern": "q: (.*)"}, "1+2?"),
    ]
    for prompt, options, rendered in cases:
        made = make_prompts(rows_of({"prompt": prompt, "answer": "3"}), DataConfig(**options), tokenizer)[0]
        assert list(made.token_ids) == ids(rendered), (prompt, options)


def test_long_prompts_stop_the_run_or_are_left_out(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of({"prompt": "1+1=", "answer": 2}, {"prompt": "11+11=", "answer": 22})
    assert error(make_prompts, rows, DataConfig(), tokenizer, 5).startswith(
        "d.jsonl:2: prompt has 6 tokens, more than 5 "
    )
    assert "more than 5 " in error(make_prompts, rows, DataConfig(max_prompt_length=5), tokenizer, 6)
    kept = make_prompts(rows, DataConfig(drop_long_prompts=True), tokenizer, 5)
    assert [prompt.id for prompt in kept] == ["d.jsonl:1"]
    assert "left out 1 of 2 prompts with more than 5 tokens" in caplog.text
    assert "all 2 prompts" in error(make_prompts, rows, DataConfig(drop_long_prompts=True), tokenizer, 2)


# ---- supervised stages


def test_sft_examples(tokenizer: Any) -> None:
    rows = rows_of({"prompt": "1+2=", "answer": "so: # 3", "full": "ok 3"})
    options = {"answer_pattern": "# (.+)", "completion_template": "<a>{answer}</a>"}
    assert sft_examples(rows, DataConfig(**options), tokenizer) == [(ids("1+2="), [*ids("<a>3</a>"), 1])]
    assert sft_examples(rows, DataConfig(completion_column="full"), tokenizer) == [(ids("1+2="), [*ids("ok 3"), 1])]
    assert "have 9 tokens, more than 8" in error(
        sft_examples, rows, DataConfig(completion_column="full"), tokenizer, max_length=8
    )
    assert len(sft_examples(rows, DataConfig(completion_column="full"), tokenizer, max_length=9)) == 1
    assert "neither is set" in error(sft_examples, rows, DataConfig(), tokenizer)
    assert "uses 'gold', and the row has prompt, answer" in error(
        sft_examples, rows, DataConfig(completion_template="{gold}"), tokenizer
    )
    assert "no column 'x'; it has prompt, answer, full" in error(
        sft_examples, rows, DataConfig(completion_column="x"), tokenizer
    )


def test_text_blocks(tokenizer: Any) -> None:
    rows = rows_of({"text": "abc"}, {"text": "de"}, {"text": "fgh"})
    assert text_blocks(rows, DataConfig(), tokenizer, 5) == [[*ids("abc"), 1, *ids("d")], [*ids("e"), 1, *ids("fgh")]]
    assert "11 tokens, less than one block of 12" in error(text_blocks, rows, DataConfig(), tokenizer, 12)
    assert "d.jsonl:1: column 'text' is ' '" in error(text_blocks, rows_of({"text": " "}), DataConfig(), tokenizer, 2)


# ---- the cursor


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> Any:
    return make_prompts(rows_of(*({"prompt": f"{i}=", "answer": i} for i in range(10))), DataConfig(), tokenizer)


def test_every_epoch_visits_every_prompt_in_an_order_of_its_own(prompts: Any) -> None:
    taken = PromptCursor(prompts, seed=0).take(30)
    epochs = [[prompt.id for prompt in taken[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(prompt.id for prompt in prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [prompt.visit for prompt in taken] == [0] * 10 + [1] * 10 + [2] * 10
    assert [prompt.id for prompt in PromptCursor(prompts, seed=1).take(10)] != epochs[0]
    assert [prompt.id for prompt in PromptCursor(prompts, 0, shuffle=False).take(12)] == [
        prompt.id for prompt in [*prompts, *prompts[:2]]
    ]


def test_the_order_is_pinned(prompts: Any) -> None:
    """A resumed run relies on it: whoever changes it has to say so in CHANGELOG.md."""
    assert [int(prompt.fields["answer"]) for prompt in PromptCursor(prompts, seed=0).take(10)] == [
        8,
        4,
        2,
        6,
        0,
        7,
        5,
        1,
        9,
        3,
    ]


@pytest.mark.parametrize("stop", range(0, 40, 7))
def test_a_resumed_cursor_goes_on_as_if_never_stopped(prompts: Any, stop: int) -> None:
    whole = [(prompt.id, prompt.visit) for prompt in PromptCursor(prompts, seed=3).take(60)]
    first, second = PromptCursor(prompts, seed=3), PromptCursor(prompts, seed=3)
    taken = [prompt for n in [7] * (stop // 7) for prompt in first.take(n)]
    second.load_state(json.loads(json.dumps(first.state())))
    taken += second.take(60 - stop)
    assert [(prompt.id, prompt.visit) for prompt in taken] == whole


def test_a_cursor_refuses_the_state_of_other_data(prompts: Any, tokenizer: Any) -> None:
    state = PromptCursor(prompts, seed=0).state()
    assert "data has 9 prompts, but the checkpoint was made with 10" in error(
        PromptCursor(prompts[:9], seed=0).load_state, state
    )
    other = make_prompts(rows_of(*({"prompt": f"{i + 1}=", "answer": i} for i in range(10))), DataConfig(), tokenizer)
    assert "other prompts than the 10 of the checkpoint" in error(PromptCursor(other, seed=0).load_state, state)
    assert "no prompts to train on" in error(PromptCursor, [], 0)


# ---- errors


def test_errors_of_prompts(tokenizer: Any) -> None:
    def of(columns: dict[str, Any], **options: Any) -> str:
        text = error(
            make_prompts,
            rows_of({"prompt": "1=", "answer": "1"}, {"prompt": "1=", **columns}),
            DataConfig(**options),
            tokenizer,
        )
        assert text.startswith("d.jsonl:2: "), text
        return text

    user = {"role": "user", "content": "1="}
    assert "no column 'answer'; it has prompt, gold; set data.answer_column" in of({"gold": 1})
    assert "'answer' is null; set data.answer_column" in of({"answer": None})
    assert "data.answer_pattern '(1)' does not match column 'answer': '2'" in of({"answer": "2"}, answer_pattern="(1)")
    assert "data.answer_pattern needs text in column 'answer', not ['1']" in of({"answer": ["1"]}, answer_pattern="(1)")
    assert "column 'prompt' is a int; a prompt is a string or a list" in of({"prompt": 7})
    assert "chat message {'role': 'user'} in column 'prompt' must be" in of({"prompt": [{"role": "user"}]})
    assert "the prompt is empty" in of({"prompt": []})
    assert "the prompt is empty" in of({"prompt": [{"role": "user", "content": " "}]})
    assert "data.chat_template is off, but the prompt has chat messages" in of(
        {"prompt": [user], "answer": "1"}, chat_template="off"
    )
    system = {"role": "system", "content": "x"}
    assert "has a system message of its own" in error(
        make_prompts, rows_of({"prompt": [system, user], "answer": "1"}), DataConfig(system_prompt="y"), tokenizer
    )
    assert "has no tokens" in error(make_prompts, rows_of({"prompt": "\u00e9", "answer": "1"}), DataConfig(), tokenizer)


def test_a_reward_without_gold_needs_no_answer_column(tokenizer: Any) -> None:
    rows = rows_of({"prompt": "1="})
    assert make_prompts(rows, DataConfig(answer_column=""), tokenizer)[0].fields == {"prompt": "1="}
    assert make_prompts(rows, DataConfig(), tokenizer, gold=False)[0].fields == {"prompt": "1="}


def test_a_tokenizer_that_lacks_something_is_named(tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    chat = rows_of({"prompt": [{"role": "user", "content": "1="}], "answer": "1"})
    assert "d.jsonl:1: the prompt is a chat, but the tokenizer has no chat template" in error(
        make_prompts, chat, DataConfig(), bare
    )
    assert "no eos token" in error(text_blocks, rows_of({"text": "a"}), DataConfig(), bare, 2)
