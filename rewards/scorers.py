"""Reward models on disk: how each kind reads a prompt and a completion, and how it is loaded and run.

Two kinds, told apart by config.json: a DeepSeek-V3 with a scalar head (model/reward_head.py), on packed rows without
padding; any sequence-classification model of transformers, on rows padded on the right behind an attention mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rewards.records import RewardInput

OURS = "DeepseekV3ForSequenceClassification"

Text = tuple[list[int], list[int]]  # token ids of a prompt and of a completion
Forward = Callable[[Sequence[Text]], list[float]]  # a forward pass over a batch


class Scorer(NamedTuple):
    """A reward model whose weights are not read yet."""

    encode: Callable[[RewardInput], Text]  # transformers' models get everything as the completion
    load: Callable[[], Forward]  # reads the weights
    context: int  # tokens a text may have; 0: nobody knows


def find_scorer(directory: Path, device: str, dtype: str) -> Scorer:
    """The model in a directory, checked as far as that is possible without its weights.

    `device`: auto is CUDA where there is any; `dtype`: auto is that of the weights. ValueError, one line that names
    rewards.reward_model.model, for a directory that holds no reward model.
    """
    kind = _our_model if _architecture(directory) == OURS else _transformers_model
    return kind(directory, device, dtype)


def _our_model(directory: Path, device: str, dtype: str) -> Scorer:
    """A DeepSeek-V3 with a scalar head, checked against its weights' headers."""
    import torch

    from model.checkpoint import Checkpoint
    from model.reward_head import DeepseekV3ForSequenceClassification

    try:
        checkpoint = Checkpoint(directory, OURS)
        with torch.device("meta"):
            checkpoint.check(DeepseekV3ForSequenceClassification(checkpoint.config))
    except ValueError as error:
        raise ValueError(f"rewards.reward_model.model: {error}") from None
    tokenizer = _tokenizer(directory)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(sample: RewardInput) -> Text:
        prompt = sample.prompt
        if not isinstance(prompt, str):
            prompt = _render(tokenizer, list(prompt), add_generation_prompt=True)
        return _ids(tokenizer, prompt), [*_ids(tokenizer, sample.completion), *end]

    def load() -> Forward:
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        network = DeepseekV3ForSequenceClassification.from_pretrained(directory, chosen, _device(device)).eval()

        def score(texts: Sequence[Text]) -> list[float]:
            with torch.inference_mode():
                return network(texts).tolist()

        return score

    return Scorer(encode, load, checkpoint.config.max_position_embeddings)


def _transformers_model(directory: Path, device: str, dtype: str) -> Scorer:
    """A sequence-classification model of transformers with one label."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"rewards.reward_model.model: {' '.join(str(error).split())[:200]}") from None
    if config.num_labels != 1:
        raise ValueError(
            f"rewards.reward_model.model {str(directory)!r} tells {config.num_labels} classes apart; "
            "a reward model gives one number (num_labels 1)"
        )
    tokenizer = _tokenizer(directory)
    # with left padding the positions of many architectures would depend on the batch
    tokenizer.padding_side = "right"
    known = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    context = min((int(n) for n in known if n and n < 1e9), default=0)  # 1e30 where the tokenizer does not know

    def encode(sample: RewardInput) -> Text:
        if not isinstance(sample.prompt, str):
            answer = {"role": "assistant", "content": sample.completion}
            return [], _ids(tokenizer, _render(tokenizer, [*sample.prompt, answer]))
        ids = list(tokenizer(sample.prompt + sample.completion)["input_ids"])
        eos = tokenizer.eos_token_id
        return [], ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def load() -> Forward:
        chosen = dtype if dtype == "auto" else getattr(torch, dtype)
        network, info = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=chosen, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(
                f"rewards.reward_model.model {str(directory)!r} lacks the weight {min(info['missing_keys'])!r}, which "
                "would be random; give a model that was trained as a reward model"
            )
        network = network.to(_device(device)).eval()
        pad = network.config.pad_token_id
        if pad is None and tokenizer.pad_token_id is not None:
            pad = network.config.pad_token_id = tokenizer.pad_token_id

        def score(texts: Sequence[Text]) -> list[float]:
            rows = [ids for _, ids in texts]
            if pad is None and len(rows) > 1:  # nothing to pad with
                return [score([text])[0] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([[*row, *[pad or 0] * (width - len(row))] for row in rows], device=network.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=network.device)
            with torch.inference_mode():
                return network(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

        return score

    return Scorer(encode, load, context)


def _architecture(directory: Path) -> str:
    """The class that config.json names. ValueError where it has no scalar head."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"rewards.reward_model.model {str(directory)!r} is no model directory (no config.json); check the path"
        )
    try:
        names = json.loads(path.read_text())["architectures"]
        name = str(names[0])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"rewards.reward_model.model: {path} names no architecture; restore the file") from None
    if not name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"rewards.reward_model.model {str(directory)!r} is a {name}, which has no scalar head; train one "
            "with `grpo rewards train`"
        )
    return name


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"rewards.reward_model.model {str(directory)!r} has no usable tokenizer: {reason}") from None


def _render(tokenizer: Any, messages: list[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the prompt is a chat, and the reward model's tokenizer has no chat template")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
