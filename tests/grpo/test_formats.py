"""Data sets of TRL, verl, OpenRLHF and slime, in their published shapes, are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config, DataConfig, load_config
from grpo.data import make_prompts, sft_examples
from grpo.sources import load_rows


class Characters:
    """A tokenizer of code points with a chat template, as small as one can be."""

    chat_template = "yes"
    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(path: str, gold: bool = True, **options: Any) -> list[Any]:
    config = DataConfig(path=path, holdout=0.0, **options)
    return make_prompts(load_rows(config)[0], config, Characters(), gold=gold)


VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": f"What is {n}+{n}? Let's think step by step.", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
        "extra_info": {"answer": f"#### {2 * n}", "index": n, "question": f"What is {n}+{n}?", "split": "train"},
    }
    for n in (1, 2)
]


def test_verl_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", VERL)
    first, second = prompts(path, format="verl")
    assert [p.fields["answer"] for p in (first, second)] == ["2", "4"]
    assert first.text == [{"content": "What is 1+1? Let's think step by step.", "role": "user"}]
    assert first.fields["data_source"] == "openai/gsm8k" and first.fields["extra_info"]["index"] == 1
    assert prompts(path, format="verl", answer_column="extra_info.answer")[1].fields["answer"] == "#### 4"
    by_hand = prompts(path, prompt_column="extra_info.question", answer_column="reward_model.ground_truth")
    assert [p.text for p in by_hand] == ["What is 1+1?", "What is 2+2?"]
    assert [p.fields["answer"] for p in by_hand] == ["2", "4"]


def test_openrlhf_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"input": "1+1?", "label": "2", "datasource": "x"}])
    [prompt] = prompts(path, format="openrlhf", prompt_template="User: {}\nAssistant: ")
    assert prompt.text == "User: 1+1?\nAssistant: " and prompt.fields["answer"] == "2"
    path = write(tmp_path / "e.jsonl", [{"context_messages": chat("1+1?"), "answer": 2}])  # other keys, by hand
    [prompt] = prompts(path, format="openrlhf", prompt_column="context_messages", answer_column="answer")
    assert prompt.text == chat("1+1?") and prompt.fields["answer"] == "2"


def test_slime_jsonl(tmp_path: Path) -> None:
    rows = [
        {"prompt": chat("1+1?"), "label": "2", "metadata": {"rm_type": "math"}},
        {"prompt": "2+2?", "label": "4", "metadata": {"rm_type": "dapo"}},
    ]
    first, second = prompts(write(tmp_path / "d.jsonl", rows), format="slime")
    assert first.text == chat("1+1?") and second.text == "2+2?"
    assert [p.fields["answer"] for p in (first, second)] == ["2", "4"]
    assert second.fields["metadata"] == {"rm_type": "dapo"}


def test_trl_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "The sky is", "solution": "blue"}, {"prompt": chat("What color?"), "solution": "$4$"}]
    plain, conversational = prompts(write(tmp_path / "d.jsonl", rows), format="trl")
    assert plain.text == "The sky is" and plain.fields["answer"] == "blue"
    assert conversational.text == chat("What color?") and conversational.fields["answer"] == "$4$"
    path = write(tmp_path / "e.jsonl", [{"prompt": "q"}])
    assert "answer" not in prompts(path, format="trl", gold=False)[0].fields


def test_trl_completions_are_what_sft_trains_on(tmp_path: Path) -> None:
    rows = [
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": chat("What color?"), "completion": [{"role": "assistant", "content": "It is blue."}]},
    ]
    config = DataConfig(path=write(tmp_path / "d.jsonl", rows), holdout=0.0, format="trl")
    examples = sft_examples(load_rows(config)[0], config, Characters())
    texts = [("".join(map(chr, prompt)), "".join(map(chr, answer[:-1]))) for prompt, answer in examples]
    assert texts == [("The sky is", " blue."), ("<user>What color?<assistant>", "It is blue.")]
    config = DataConfig(path=config.path, holdout=0.0, format="trl", completion_template="!")
    assert config.completion_column == "" and sft_examples(load_rows(config)[0], config, Characters())[0][1] == [33, 0]


def test_trl_preferences_with_and_without_a_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": chat("What color?", "Blue."), "rejected": chat("What color?", "Green.")},
    ]
    first, second, third = prompts(write(tmp_path / "d.jsonl", rows), format="trl", gold=False)
    assert first.text == second.text == "The sky is"
    assert first.fields["chosen"] == second.fields["chosen"] == " blue." and second.fields["rejected"] == " green."
    assert third.text == chat("What color?") and third.fields["rejected"] == chat("", "Green.")[1:]
    path = write(tmp_path / "bad.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"bad.jsonl:1: chosen and rejected have no common beginning"):
        prompts(path, format="trl", gold=False)
    with pytest.raises(ValueError, match=r"no column 'prompt'"):  # nothing is rearranged unasked
        prompts(path, gold=False)


def test_a_format_fills_in_what_is_not_given_and_survives_a_saved_configuration() -> None:
    config = load_config({"data": {"format": "verl", "prompt_column": "question"}}, ["--data.path=x.parquet"])
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "reward_model.ground_truth")
    assert Config.model_validate(config.model_dump(mode="json")).data == config.data
    assert DataConfig().answer_column == "answer" and DataConfig(format="slime").answer_column == "label"


def test_errors_name_key_and_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "reward_model": {"style": "rule"}}])
    with pytest.raises(
        ValueError, match=r"no column 'reward_model.ground_truth'; it has prompt, reward_model; set data.answer_column"
    ):
        prompts(path, format="verl")
    with pytest.raises(ValueError, match=r"data.prompt_template 'User: ' needs one \{\}"):
        DataConfig(prompt_template="User: ")
    with pytest.raises(ValueError, match=r"data.prompt_template needs string prompts"):
        prompts(write(tmp_path / "e.jsonl", [{"prompt": chat("q")}]), gold=False, prompt_template="U: {}")
    with pytest.raises(ValueError, match="format"):
        DataConfig(format="nemo")
