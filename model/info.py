"""What a model weighs, counted from its config alone: parameters, KV cache, memory. Pure functions, no weights."""

import math
from dataclasses import dataclass
from typing import Any, Self

from rich.table import Table

from model.config import DeepseekV3Config
from model.fp8 import scale_shape

TRAINING_BYTES = 16  # a parameter: FP32 weight, gradient, and AdamW's two moments


@dataclass(frozen=True)
class Tally:
    """Numbers in a part of a model, by how FP8 checkpoints store them."""

    fp8: int = 0  # in matrices stored as FP8 codes
    scales: int = 0  # FP32 factors of their blocks
    bf16: int = 0  # embedding, head, norms, routers, eh_proj
    biases: int = 0  # router biases, FP32 in every form; buffers, not trained

    @classmethod
    def of_matrices(cls, *shapes: tuple[int, int]) -> Self:
        return cls(sum(map(math.prod, shapes)), sum(math.prod(scale_shape(shape)) for shape in shapes))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.fp8 + other.fp8, self.scales + other.scales, self.bf16 + other.bf16, self.biases + other.biases
        )

    def __mul__(self, times: int) -> "Tally":
        return Tally(self.fp8 * times, self.scales * times, self.bf16 * times, self.biases * times)

    @property
    def parameters(self) -> int:
        """Router biases counted."""
        return self.fp8 + self.bf16 + self.biases

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of weights in BF16 and in FP8, and of training in FP32 (gradients and AdamW in, activations out)."""
        return {
            "bf16": 2 * (self.fp8 + self.bf16) + 4 * self.biases,
            "fp8": self.fp8 + 4 * self.scales + 2 * self.bf16 + 4 * self.biases,
            "training": TRAINING_BYTES * (self.fp8 + self.bf16) + 4 * self.biases,
        }


@dataclass(frozen=True)
class ModelTally:
    """A model in parts. Activated: what one token goes through, K of E routed experts; routers whole."""

    embedding: Tally  # the head has as many
    main: Tally  # embedding and head included
    main_activated: Tally
    mtp: Tally  # all MTP layers; embedding and head are the main model's
    mtp_activated: Tally


def tally(config: DeepseekV3Config) -> ModelTally:
    """Count every parameter and router bias of the model that this config describes."""
    d, layers, depth = config.hidden_size, config.num_hidden_layers, config.num_nextn_predict_layers
    embedding = Tally(bf16=config.vocab_size * d)
    outer = embedding * 2 + Tally(bf16=d)  # and the final norm
    extra = Tally(bf16=2 * d * d + 3 * d)  # of an MTP layer: eh_proj, enorm, hnorm, shared_head.norm

    def blocks(first: int, last: int, experts: int) -> Tally:
        dense = min(max(config.first_k_dense_replace - first, 0), last - first)
        layer = _attention(config) + Tally(bf16=2 * d)
        mlp = _mlp(config, config.intermediate_size) * dense
        return layer * (last - first) + mlp + _moe(config, experts) * (last - first - dense)

    every, chosen = config.n_routed_experts, config.num_experts_per_tok
    return ModelTally(
        embedding=embedding,
        main=outer + blocks(0, layers, every),
        main_activated=outer + blocks(0, layers, chosen),
        mtp=extra * depth + blocks(layers, layers + depth, every),
        mtp_activated=extra * depth + blocks(layers, layers + depth, chosen),
    )


def _attention(config: DeepseekV3Config) -> Tally:
    d, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    matrices = [
        (latent + config.qk_rope_head_dim, d),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        (d, heads * config.v_head_dim),
    ]
    rank = config.q_lora_rank
    matrices += [(queries, d)] if rank is None else [(rank, d), (queries, rank)]
    return Tally.of_matrices(*matrices) + Tally(bf16=latent + (rank or 0))


def _mlp(config: DeepseekV3Config, width: int) -> Tally:
    d = config.hidden_size
    return Tally.of_matrices((width, d), (width, d), (d, width)) if width else Tally()


def _moe(config: DeepseekV3Config, experts: int) -> Tally:
    """With that many of the routed experts."""
    router = Tally(bf16=config.n_routed_experts * config.hidden_size, biases=config.n_routed_experts)
    shared = _mlp(config, config.n_shared_experts * config.moe_intermediate_size)
    return router + shared + _mlp(config, config.moe_intermediate_size) * experts


def kv_bytes_per_token(config: DeepseekV3Config) -> int:
    """BF16 bytes that a token leaves in the MLA cache: latent and rotary key, once a layer (MTP layers apart)."""
    return 2 * (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers


def model_info(config: DeepseekV3Config) -> dict[str, Any]:
    """All of it as plain numbers, ready for JSON: parameters with router biases counted, memory in bytes."""
    parts = tally(config)
    return {
        "parameters": parts.main.parameters,
        "activated": parts.main_activated.parameters,
        "embedding": parts.embedding.parameters,
        "mtp_layers": config.num_nextn_predict_layers,
        "mtp_parameters": parts.mtp.parameters,
        "mtp_activated": parts.mtp_activated.parameters,
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "memory_bytes": parts.main.memory,
        "mtp_memory_bytes": parts.mtp.memory,
    }


def info_table(info: dict[str, Any]) -> Table:
    """What `model_info` gives, for people."""
    depth = info["mtp_layers"]
    table = Table("", "model", f"{depth} MTP layer{'s' if depth > 1 else ''}" if depth else "no MTP layer")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, unit: str, *numbers: int) -> None:
        table.add_row(name, *(readable(n, unit) for n in numbers[: 2 if depth else 1]))

    row("parameters", "", info["parameters"], info["mtp_parameters"])
    row("activated by a token", "", info["activated"], info["mtp_activated"])
    row("  embedding and head", "", 2 * info["embedding"])
    for key, name in (("bf16", "weights, BF16"), ("fp8", "weights, FP8"), ("training", "training, FP32 AdamW")):
        row(name, "B", info["memory_bytes"][key], info["mtp_memory_bytes"][key])
    row("KV cache of a token, BF16", "B", info["kv_bytes_per_token"])
    return table


def readable(number: int, unit: str = "") -> str:
    """With a power of 1000: "70.272 kB"; a number without a unit in the billions of model names, "671.026 B"."""
    power = min((len(str(number)) - 1) // 3, 4)
    prefix = ("", "k", "M", "G" if unit else "B", "T")[power]
    return f"{number / 1000**power:.{3 if power else 0}f} {prefix}{unit}"
