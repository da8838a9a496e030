"""Any causal language model of transformers as a policy: loading, packed rows, published names.

Invariant: what is trained is what an engine computes. A checkpoint with a tensor too few or too many is an error (where
transformers would draw the missing one at random), and so is a head that does more than a matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.layout import SequenceLayout
from model.shards import TensorSpec, write_shards

if TYPE_CHECKING:  # transformers takes a second to import
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_config(directory: str | Path) -> PreTrainedConfig:
    """The config of a model directory. Raises ValueError for one that transformers does not know or that is broken."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{directory}: transformers does not take its config: {' '.join(str(error).split())[:200]}"
        ) from error


def empty_auto(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this config, on the default device (torch.device("meta"): without weights)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def load_auto(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a directory, in evaluation mode (no dropout). dtype None: the one its config names.

    Raises ValueError unless the weights are exactly the model's.
    """
    from transformers import AutoModelForCausalLM

    auto_config(directory)  # its errors are ours
    return _complete(AutoModelForCausalLM, directory, dtype=dtype or "auto", local_files_only=True)


def _complete(kind: Any, directory: str | Path | None, **options: Any) -> PreTrainedModel:
    """kind.from_pretrained, with a ValueError for what it would only report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = str(directory or "the weights")
    try:
        model, found = kind.from_pretrained(
            directory, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: transformers does not take it: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    for key, remedy in (
        ("missing_keys", "missing from the weights: use a complete checkpoint"),
        ("unexpected_keys", "not part of this model: check config.json against the weights"),
        ("mismatched_keys", "of another shape than config.json asks for: they belong to different models"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found[key])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where}: {', '.join(names[:3])}{more} {remedy}")
    return model


def head_weight(model: PreTrainedModel) -> Tensor:
    """[V, d]: the matrix that makes logits of hidden states; that of the embedding where the two are tied."""
    return model.get_output_embeddings().weight  # type: ignore[return-value]


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises ValueError where logits are not hidden states times head_weight: a bias, a scale or a cap comes after."""
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size
    want = model(input_ids=ids, use_cache=False).logits
    if not (_hidden(model, ids) @ head_weight(model).T - want).abs().max() <= 1e-2 * want.abs().max():
        raise ValueError(
            f"the logits of {type(model).__name__} are not its hidden states times its head's matrix (a bias, a scale "
            "or a cap comes after it); model.family auto cannot train it"
        )


def _hidden(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """rows [B, L] of token ids -> [B, L, d], what the head gets."""
    # Without a mask or positions: transformers' own fast paths for plain causal rows.
    return model.base_model(input_ids=rows, use_cache=False).last_hidden_state


def packed_hidden(model: PreTrainedModel, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
    """input_ids [T], packed as `layout` says -> hidden states [T, d] before the head.

    Right for any causal architecture, whatever mixes its tokens: a segment is a row of its own after its parent's
    tokens, in at most a few padded batches of similar length. Padding comes after all real tokens, so none sees it.
    """
    return layout.scatter([_hidden(model, rows) for rows in layout.gather(input_ids)])


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Those of config.json, and of generation_config.json, where chat models have more."""
    named = [getattr(config, "eos_token_id", None) for config in (model.config, model.generation_config)]
    return {token for ids in named if ids is not None for token in ([ids] if isinstance(ids, int) else ids)}


def _inner(model: Any) -> Any:
    """The transformers model, where it is wrapped in a MergedModel."""
    return model if hasattr(model, "all_tied_weights_keys") else model.model


def published(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor) of a model, or of model.lora's MergedModel around one; no copy where there need
    be none. A tensor that is tied to another one is not published."""
    from transformers.core_model_loading import revert_weight_conversion

    inner = _inner(model)
    state = model.state_dict()
    own = {name: state[name].detach() for name in state if name not in inner.all_tied_weights_keys}
    yield from revert_weight_conversion(inner, own).items()


@torch.no_grad()
def load_published(model: PreTrainedModel, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Fills the model from (published name, tensor) pairs. Raises ValueError, before it changes, unless they are a
    complete set."""
    given: dict[str, Tensor] = {}
    for name, tensor in pairs:
        if name in given:
            raise ValueError(f"{name} was given twice: each tensor may come once per load")
        given[name] = tensor
    fresh = _complete(type(model), None, config=model.config, state_dict=given, dtype=model.dtype)
    model.load_state_dict(fresh.state_dict())


def load_auto_weights(model: PreTrainedModel, directory: str | Path) -> None:
    """Fills the model from a directory. Raises ValueError, before it changes, for one that does not fit."""
    state = load_auto(directory, model.dtype).state_dict()
    own = model.state_dict()
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
        raise ValueError(f"{directory} holds another model than the one to be filled; keep what the run began with")
    model.load_state_dict(state)


def save_auto(model: Any, directory: str | Path, max_shard_bytes: int) -> None:
    """Writes what `published` gives, config.json and generation_config.json (which may name end tokens)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    inner = _inner(model)
    tensors = dict(published(model))
    layout = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_shards(directory, layout, iter(tensors.items()), max_shard_bytes)
    config = copy.deepcopy(inner.config)
    config.dtype, config.architectures = inner.dtype, [type(inner).__name__]
    config.save_pretrained(directory)
    if inner.generation_config is not None:
        inner.generation_config.save_pretrained(directory)
