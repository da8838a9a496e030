"""Names: the only place that converts in-memory names to the published per-expert checkpoint names, and back.

Checkpoints, weight sync and vLLM all go through it. In memory experts are stacked and MTP layers are `mtp_layers.{k}`;
published names are per expert, and MTP layers are `model.layers.{num_hidden_layers + k}` with own copies of
the embedding and the head.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from model.config import DeepseekV3Config

MTP_COPIES = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
# What released FP8 checkpoints quantise: MLA projections, all gated MLPs; not embedding, head, norms, router, eh_proj.
FP8_WEIGHT = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
SCALE_SUFFIX = "_scale_inv"  # X.weight_scale_inv beside X.weight
PEFT_PREFIX = "base_model.model."  # of an adapter's tensors
LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
FUSED = {
    "q_a_proj": "qkv_a",
    "kv_a_proj_with_mqa": "qkv_a",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}  # projections that engines fuse


class HFModel(Protocol):
    """What naming needs of a model: its config and its tensors (DeepseekV3ForCausalLM, without importing it)."""

    config: DeepseekV3Config

    def state_dict(self, *args: Any, **kwargs: Any) -> Any: ...


def to_hf(name: str, tensor: Tensor, config: DeepseekV3Config) -> Iterator[tuple[str, Tensor]]:
    """The published (name, tensor) pairs of one in-memory tensor; tensors are views, nothing is copied."""
    yield from _own_names(name, tensor, config)
    if name in MTP_COPIES:
        for k in range(config.num_nextn_predict_layers):
            yield f"model.layers.{config.num_hidden_layers + k}.{MTP_COPIES[name]}", tensor


def _own_names(name: str, tensor: Tensor, config: DeepseekV3Config) -> Iterator[tuple[str, Tensor]]:
    if name.startswith("mtp_layers."):
        _, k, rest = name.split(".", 2)
        name = f"model.layers.{config.num_hidden_layers + int(k)}.{rest}"
    if name.endswith(".experts.gate_up_proj"):
        stem, inner = name.removesuffix(".gate_up_proj"), tensor.shape[1] // 2
        for e in range(tensor.shape[0]):
            yield f"{stem}.{e}.gate_proj.weight", tensor[e, :inner]
            yield f"{stem}.{e}.up_proj.weight", tensor[e, inner:]
    elif name.endswith(".experts.down_proj"):
        for e in range(tensor.shape[0]):
            yield f"{name.removesuffix('.down_proj')}.{e}.down_proj.weight", tensor[e]
    else:
        yield name, tensor


def from_hf(hf_name: str, config: DeepseekV3Config) -> tuple[str, int | None, str | None] | None:
    """Where a published tensor lives in memory: (name, expert or None, gate_proj | up_proj | down_proj or None).

    None for names that need no place: the MTP layers' copies of embedding and head, and the layers of an MTP depth
    this config leaves out.
    """
    name, layer = hf_name, LAYER.fullmatch(hf_name)
    if layer is not None and int(layer[1]) >= config.num_hidden_layers:
        k = int(layer[1]) - config.num_hidden_layers
        if k >= config.num_nextn_predict_layers or layer[2] in MTP_COPIES.values():
            return None
        name = f"mtp_layers.{k}.{layer[2]}"
    expert = EXPERT.fullmatch(name)
    if expert is None:
        return name, None, None
    stacked = "down_proj" if expert[3] == "down_proj" else "gate_up_proj"
    return f"{expert[1]}.{stacked}", int(expert[2]), expert[3]


def load_unit(hf_name: str) -> str:
    """What a published tensor is loaded with: engines take a module, fused projections or all experts of a layer whole.

    Tensors with the same unit must come together; a part of a unit would leave the rest of it undefined.
    """
    if hf_name.startswith(PEFT_PREFIX):
        return PEFT_PREFIX  # an adapter
    module = hf_name.rpartition(".")[0]
    if ".experts." in module:
        return module.partition(".experts.")[0] + ".experts"
    stem, _, leaf = module.rpartition(".")
    return f"{stem}.{FUSED.get(leaf, leaf)}"


def stored_in_fp8(hf_name: str) -> bool:
    """Whether a published FP8 checkpoint stores this weight as codes and scales."""
    return FP8_WEIGHT.fullmatch(hf_name) is not None


def hf_state(model: HFModel, exact: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor) of the model, detached views into its parameters.

    What FP8 layers of a BF16 model keep in FP32 is rounded to the model's dtype, a copy, unless `exact`.
    """
    state = model.state_dict()
    dtype = state["model.norm.weight"].dtype
    for name, tensor in state.items():
        for published, part in to_hf(name, tensor.detach(), model.config):
            yield published, part.to(dtype) if not exact and stored_in_fp8(published) else part


class HFLoader:
    """Fills a model's parameters in place from (published name, tensor) pairs, in any order and any number of calls."""

    def __init__(self, model: HFModel) -> None:
        self.config = model.config
        self.state = model.state_dict()  # references to the parameters, not copies
        self.pending = {n: t.shape[0] * (2 if "gate_up" in n else 1) if ".experts." in n and "shared" not in n else 1
                        for n, t in self.state.items()}  # fmt: skip
        self.seen: set[str] = set()
        self.unexpected: list[str] = []

    @torch.no_grad()
    def load(self, hf_name: str, tensor: Tensor) -> None:
        """Copy one tensor to its place (cast to the parameter's dtype). ValueError if its shape does not fit."""
        if hf_name in self.seen:
            raise ValueError(f"{hf_name} was given twice: each tensor may come once per load")
        self.seen.add(hf_name)
        place = from_hf(hf_name, self.config)
        if place is None:
            return
        name, expert, part = place
        target = self.state.get(name)
        if target is None or (expert is not None and expert >= target.shape[0]):
            self.unexpected.append(hf_name)
            return
        if expert is not None:
            inner = target.shape[1] // 2
            target = target[expert]
            if part == "gate_proj":
                target = target[:inner]
            elif part == "up_proj":
                target = target[inner:]
        if target.shape != tensor.shape:
            raise ValueError(
                f"{hf_name} has shape {tuple(tensor.shape)}: the config asks for {tuple(target.shape)}; "
                "weights and config.json belong to different models"
            )
        target.copy_(tensor)
        self.pending[name] -= 1 if expert is not None else self.pending[name]

    @property
    def missing(self) -> list[str]:
        """In-memory names that have not been filled completely."""
        return [name for name, count in self.pending.items() if count > 0]

    def finish(self, strict: bool = True) -> None:
        """Raise ValueError if tensors are missing or unexpected (strict)."""
        if strict and self.missing:
            raise ValueError(f"{_some(self.missing)} missing from the weights: use a complete checkpoint")
        if strict and self.unexpected:
            raise ValueError(f"{_some(self.unexpected)} not part of this model: check config.json against the weights")


def load_hf_state(model: HFModel, pairs: Iterable[tuple[str, Tensor]], strict: bool = True) -> HFLoader:
    """Load (published name, tensor) pairs in place; the loader tells what was missing and unexpected."""
    loader = HFLoader(model)
    for name, tensor in pairs:
        loader.load(name, tensor)
    loader.finish(strict)
    return loader


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
