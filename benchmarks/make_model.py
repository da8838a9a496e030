"""Makes what both sides of a benchmark read: a tiny DeepSeek-V3 by transformers, its tokenizer, and prompts.

    python -m benchmarks.make_model KIND      # writes runs/.cache/bench-KIND/{model/,prompts.json}

`smoke` has learned to answer sums (about 3.5 tokens, as in the smoke run after its warm start). `uneven` has
random weights and stops with a probability of about 1/44 a token whatever stands before: up to 128 tokens, about 40
on average.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from benchmarks.common import CACHE

SPECIAL = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "0123456789+-*=() .abcdefghijklmnopqrs"
PAD, BOS, EOS = range(3)
SUM_LENGTH = 10  # tokens of the longest sum: 99+99=198 and the end
CAP, MEAN_LENGTH = 128, 40.0  # tokens of the uneven case
NUM_PROMPTS = 512
KINDS = ("smoke", "uneven")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[PAD]))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **names)


def random_model(seed: int = 0) -> DeepseekV3ForCausalLM:
    """The smoke run's sizes, in float32."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.0,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.05,
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    )
    model = DeepseekV3ForCausalLM._from_config(config, dtype=torch.float32, experts_implementation="grouped_mm")
    model.generation_config = GenerationConfig(do_sample=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model


def sums(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, answer) of sums of two numbers of one or two digits."""
    operands = [(rng.randrange(100), rng.randrange(100)) for _ in range(count)]
    return [(f"{a}+{b}=", str(a + b)) for a, b in operands]


def learn_sums(model: DeepseekV3ForCausalLM, steps: int = 250, batch: int = 128) -> None:
    """Next-token training on answers, as the smoke run warms up: enough to end an answer where it ends."""
    index = {character: len(SPECIAL) + place for place, character in enumerate(CHARACTERS)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rng = random.Random(1)
    for step in range(steps):
        ids = torch.full((batch, SUM_LENGTH), PAD)
        labels = torch.full((batch, SUM_LENGTH), -100)
        for row, (prompt, answer) in enumerate(sums(batch, rng)):
            tokens = [*(index[character] for character in prompt + answer), EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, len(prompt) : len(tokens)] = ids[row, len(prompt) : len(tokens)]
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def steady_stop(model: DeepseekV3ForCausalLM, prompts: torch.Tensor) -> None:
    """Makes the end token about equally likely everywhere, with completions of MEAN_LENGTH tokens on average.

    Every embedding gets the same large first feature; it survives to the head, where only the special tokens read it.
    The weight with which the end token does so is found by bisection.
    """
    head = model.lm_head.weight
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        head[:, 0] = 0.0
        head[[PAD, BOS, EOS]] = 0.0
        head[[PAD, BOS], 0] = -10.0
        low, high = -2.0, 2.0
        for _ in range(12):
            head[EOS, 0] = (low + high) / 2
            torch.manual_seed(0)
            longer = mean_length(model, prompts) > MEAN_LENGTH
            low, high = ((low + high) / 2, high) if longer else (low, (low + high) / 2)


def mean_length(model: DeepseekV3ForCausalLM, prompts: torch.Tensor) -> float:
    tokens = model.generate(prompts, max_new_tokens=CAP, top_k=0)[:, prompts.shape[1] :]
    ended = tokens == EOS
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, CAP)
    return lengths.float().mean().item()


def make(kind: str) -> Path:
    """The folder of a kind, made if it is not there: model/ and prompts.json."""
    assert kind in KINDS, f"{kind=}, known: {KINDS}"
    folder = CACHE / f"bench-{kind}"
    if (folder / "prompts.json").exists():
        return folder
    model, text = random_model(), tokenizer()
    prompts = [prompt for prompt, _ in sums(NUM_PROMPTS, random.Random(0))]
    if kind == "smoke":
        learn_sums(model)
    else:
        same = [prompt for prompt in prompts if len(prompt) == 6][:256]
        steady_stop(model, text(same, return_tensors="pt")["input_ids"])
    model.save_pretrained(folder / "model")
    text.save_pretrained(folder / "model")
    (folder / "prompts.json").write_text(json.dumps(prompts))  # last: its presence says that the folder is whole
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[1:] or KINDS:
        print(make(wanted))
