"""The DeepSeek-V3 causal language model: embedding, decoder layers, final norm, head, and its MTP layers.

model/reward_head.py puts another head on the same trunk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.block import DeepseekV3DecoderLayer, MTPLayer
from model.checkpoint import SHARD_BYTES, Checkpoint, save_model
from model.config import ARCHITECTURE, DeepseekV3Config
from model.layers import Embedding, RMSNorm
from model.layout import SequenceLayout
from model.moe import Experts, Routing, TopkRouter
from model.names import load_hf_state
from model.rope import RotaryTables


@dataclass(frozen=True)
class PackedOutput:
    """What a forward pass over T packed tokens gives."""

    hidden: Tensor  # [T, d], after the final norm
    routed_experts: Tensor | None = None  # [T, L_moe, K] int64, if asked for
    expert_counts: Tensor | None = None  # [L_moe, E] int64, if asked for
    router_scores: tuple[Tensor, ...] | None = None  # L_moe of [T, E] float32 with gradient, if asked for
    routes_differ: Tensor | None = None  # [T, L_moe] bool, in a replay: not what the routers would have chosen


@dataclass(frozen=True)
class CausalLMOutput:
    """logits # [B, T, V] and the hidden states they come from # [B, T, d]."""

    logits: Tensor
    hidden: Tensor


class DeepseekV3Model(nn.Module):
    """Token ids in, hidden states after the final norm out."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTables(config)
        self.gradient_checkpointing = False

    def forward(
        self, input_ids: Tensor, layout: SequenceLayout, routed_experts: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """input_ids # [T], routed_experts # [T, L_moe, K] or None -> (hidden # [T, d], Routing of each MoE layer)."""
        cos, sin = self.rotary(layout.position_ids)
        x = self.embed_tokens(input_ids)  # [T, d]
        routings: list[Routing] = []
        for layer in self.layers:
            assert isinstance(layer, DeepseekV3DecoderLayer)
            replay = routed_experts[:, len(routings)] if layer.is_moe and routed_experts is not None else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, routing = checkpoint(layer, x, cos, sin, layout, replay, use_reentrant=False)
            else:
                x, routing = layer(x, cos, sin, layout, replay)
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings


class DeepseekV3PreTrainedModel(nn.Module):
    """What every head on the trunk shares: new weights, the packed pass, directories read and written.

    A new model is drawn from torch's global random state (normal, std initializer_range). On torch.device("meta")
    nothing is drawn. `model.model.gradient_checkpointing = True` recomputes each layer in the backward pass.
    """

    architecture: ClassVar[str]  # its name in config.json
    head_name: ClassVar[str]  # of the linear layer on the hidden states
    config: DeepseekV3Config
    model: DeepseekV3Model
    mtp_layers: nn.ModuleList

    @property
    def head(self) -> nn.Linear:
        return getattr(self, self.head_name)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every matrix from normal(0, initializer_range); norms 1, router bias 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, TopkRouter, Experts)):
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0.0, self.config.initializer_range)
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            if isinstance(module, TopkRouter):
                module.e_score_correction_bias.zero_()

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, MTP layers included (router biases are buffers and not counted)."""
        return sum(p.numel() for p in self.parameters())

    def forward_packed(
        self,
        input_ids: Tensor,
        layout: SequenceLayout,
        routed_experts: Tensor | None = None,
        output_routing: bool = False,
        output_router_scores: bool = False,
    ) -> PackedOutput:
        """input_ids # [T] packed as `layout` says, routed_experts # [T, L_moe, K] to replay (-1: not recorded).

        output_routing fills routed_experts and expert_counts, output_router_scores fills router_scores.
        Raises ValueError when the shapes disagree.
        """
        config, tokens = self.config, len(layout)
        if input_ids.shape != (tokens,):
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: the layout packs {tokens} tokens")
        expected = (tokens, config.num_moe_layers, config.num_experts_per_tok)
        if routed_experts is not None and routed_experts.shape != expected:
            raise ValueError(f"routed_experts has shape {tuple(routed_experts.shape)}: replay needs {expected}")
        hidden, routings = self.model(input_ids, layout, routed_experts)
        empty = hidden.new_zeros(expected, dtype=torch.int64)
        replayed = routed_experts is not None and len(routings) > 0
        return PackedOutput(
            hidden,
            (torch.stack([r.experts for r in routings], 1) if routings else empty) if output_routing else None,
            (torch.stack([r.counts for r in routings]) if routings else empty[0]) if output_routing else None,
            tuple(r.scores for r in routings) if output_router_scores else None,
            torch.stack([d for r in routings if (d := r.differs) is not None], 1) if replayed else None,
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Self:
        """Load a Hugging Face directory, BF16 or FP8 (dequantised); dtype None keeps the one its config names.

        ValueError if it does not fit, before any weight is read. MTP layers that the config promises and the weights
        lack (transformers drops them) are left out with a warning.
        """
        checkpoint = Checkpoint(directory, cls.architecture)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        checkpoint.check(model)
        model = model.to(dtype or getattr(torch, checkpoint.config.dtype)).to_empty(device=device)
        load_hf_state(model, checkpoint.read())
        return model

    def save_pretrained(
        self, directory: str | Path, max_shard_bytes: int = SHARD_BYTES, scale_fmt: str | None = None
    ) -> None:
        """Write config.json and safetensors under the published per-expert names (no tokenizer).

        scale_fmt None keeps the model's dtype; "float" or "ue8m0" gives the released FP8 form, with FP32 scales or
        powers of two, and all other weights BF16.
        """
        save_model(self, directory, max_shard_bytes, scale_fmt, self._config_entries())

    def _config_entries(self) -> dict[str, Any]:
        """What config.json says beyond the configuration."""
        return {"architectures": [self.architecture]}


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel):
    """The model with its output head; `mtp_layers` holds the multi-token prediction layers of the config."""

    architecture = ARCHITECTURE
    head_name = "lm_head"

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        depth = config.num_nextn_predict_layers
        self.mtp_layers = nn.ModuleList(MTPLayer(config, config.num_hidden_layers + k) for k in range(depth))
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """input_ids # [B, T], full causal attention from position 0 -> logits # [B, T, V]."""
        layout = SequenceLayout.from_batch(*input_ids.shape, device=input_ids.device)
        hidden, _ = self.model(input_ids.flatten(), layout)
        hidden = hidden.unflatten(0, input_ids.shape)
        return CausalLMOutput(self.lm_head(hidden), hidden)
