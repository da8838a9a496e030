"""A new random model with its tokenizer, from a YAML: what smoke runs and tests start from."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.config import DeepseekV3Config
from model.modeling import DeepseekV3ForCausalLM

TOKENIZER_KEYS = ("type", "characters", "special_tokens", "pad_token", "bos_token", "eos_token", "chat_template")


def create_model(spec: dict[str, Any] | str | Path, out_dir: str | Path, seed: int) -> DeepseekV3ForCausalLM:
    """Write a randomly initialised model and its tokenizer to out_dir, and return the model.

    spec: {config: DeepseekV3Config fields, tokenizer: see build_tokenizer} or the path of such a YAML. vocab_size and
    the bos/eos/pad ids come from the tokenizer (a larger vocab_size is kept). Equal seeds give equal weights;
    torch's global random state is left as it was. Raises ValueError for unknown keys and unusable values.
    """
    if isinstance(spec, (str, Path)):
        if not Path(spec).is_file():
            raise ValueError(f"{spec} does not exist: give the path of a model YAML")
        spec = yaml.safe_load(Path(spec).read_text())
    if not isinstance(spec, dict):
        raise ValueError(f"model spec is {type(spec).__name__}: give a mapping with `config` and `tokenizer`")
    _check_keys("model spec", spec, ("config", "tokenizer"))
    tokenizer = build_tokenizer(spec.get("tokenizer") or {})
    values = dict(spec.get("config") or {})
    _check_keys("config", values, [f.name for f in fields(DeepseekV3Config)])
    if values.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise ValueError(f"config.vocab_size is {values['vocab_size']}: the tokenizer has {len(tokenizer)} tokens")
    values.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(tokenizer, name)
    config = DeepseekV3Config.from_dict(values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(config).to(getattr(torch, config.dtype))
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return model


def build_tokenizer(spec: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, plus whole tokens such as <answer>.

    spec: {type: characters, characters: "0123...", special_tokens: [<pad>, <bos>, <eos>, <answer>, ...],
    pad_token / bos_token / eos_token: their names if not <pad> / <bos> / <eos>, chat_template: Jinja text or absent}.
    Ids: special_tokens in order, then characters. Only pad, bos and eos are dropped by skip_special_tokens. A character
    outside the list makes encoding fail: there is no unknown token (`encode` below names the character).
    """
    _check_keys("tokenizer", spec, TOKENIZER_KEYS)
    if spec.get("type") != "characters":
        raise ValueError(f"tokenizer.type is {spec.get('type')!r}: use 'characters'")
    characters, whole = str(spec.get("characters") or ""), list(spec.get("special_tokens") or [])
    repeated = sorted({c for c in characters if characters.count(c) > 1} | {t for t in whole if whole.count(t) > 1})
    if not characters or repeated:
        raise ValueError(f"tokenizer.characters or special_tokens are empty or repeat {repeated}: list each once")
    roles = {f"{role}_token": spec.get(f"{role}_token", f"<{role}>") for role in ("pad", "bos", "eos")}
    for role, token in roles.items():
        if token not in whole:
            raise ValueError(f"tokenizer.{role} is {token!r}: add it to tokenizer.special_tokens")
    vocabulary = {token: i for i, token in enumerate([*whole, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown character>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    control = set(roles.values())
    core.add_special_tokens([AddedToken(t, normalized=False) for t in whole if t in control])
    core.add_tokens([AddedToken(t, normalized=False, special=False) for t in whole if t not in control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **roles)
    if spec.get("chat_template"):
        tokenizer.chat_template = spec["chat_template"]
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of text without added control tokens. ValueError naming the characters the tokenizer lacks."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises a bare Exception that does not say which character
        lacking = sorted({c for c in text if tokenizer.get_vocab().get(c) is None})
        raise ValueError(f"the tokenizer has no token for {lacking}: add them to tokenizer.characters") from error


def _check_keys(where: str, given: dict[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where} has the unknown key {key!r}: {hint}")
