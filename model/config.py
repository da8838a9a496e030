"""What a DeepSeek-V3 model is: its sizes, read from and written to a Hugging Face `config.json`. Needs no torch."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

ARCHITECTURE = "DeepseekV3ForCausalLM"
SCORER_ARCHITECTURE = "DeepseekV3ForSequenceClassification"  # the same trunk under a head of one number
# Kimi-K2 is the same architecture under its own model_type (it names our class in `architectures`).
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
YARN_KEYS = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor", "truncate",
)  # fmt: skip


@dataclass(frozen=True)
class DeepseekV3Config:
    """Sizes and constants of a DeepSeek-V3 model, under the field names of the published `config.json`.

    Sizes have no default; the other defaults are transformers' (except `num_nextn_predict_layers`: missing means 0).
    Raises ValueError, naming key, value and remedy, for a value this implementation cannot honour.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # None: one plain q_proj
    num_key_value_heads: int | None = None  # nominal under MLA; None: num_attention_heads
    num_nextn_predict_layers: int = 0
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.5
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # YaRN constants (YARN_KEYS), or None: plain RoPE
    rope_interleave: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen: the only place that writes fields, to normalise them
        if self.num_key_value_heads is None:
            set_field(self, "num_key_value_heads", self.num_attention_heads)
        set_field(self, "rope_scaling", _normalise_rope_scaling(self.rope_scaling, self.max_position_embeddings))
        for name, only in (
            ("moe_layer_freq", 1), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("hidden_act", "silu"),
            ("rope_interleave", True), ("attention_bias", False), ("tie_word_embeddings", False),
            ("num_key_value_heads", self.num_attention_heads),
        ):  # fmt: skip
            if getattr(self, name) != only:
                raise ValueError(f"{name} is {getattr(self, name)!r}: DeepSeek-V3 needs {only!r}; set it to {only!r}")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "max_position_embeddings",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a whole number of at least 1")
        for name in ("num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a whole number of at least 0")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: rotary pairs need an even number")
        per_group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or per_group < 2:
            # A group's score is the sum of its two best experts, so a group needs two.
            raise ValueError(
                f"n_group is {self.n_group} with n_routed_experts {self.n_routed_experts}: groups must be equal and "
                "hold at least 2 experts each; n_group: 1 and topk_group: 1 switch groups off"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}: at most n_group ({self.n_group}) groups can be kept")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: the {self.topk_group} kept groups hold only "
                f"{self.topk_group * per_group} experts; lower it or raise topk_group"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}: use float32, bfloat16 or float16")

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without and the part with rotary embedding."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Main layers with experts (MTP layers not counted)."""
        return max(self.num_hidden_layers - self.first_k_dense_replace, 0)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a sequence; empty when the config names none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's mscale^2 when the config has YaRN (V3: 0.1352338).

        The factor belongs to the weights: it applies at every length, not only beyond the original context.
        """
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling["factor"], self.rope_scaling.get("mscale_all_dim") or 0.0) ** 2
        return scale

    @classmethod
    def from_dict(cls, values: dict[str, Any], architecture: str = ARCHITECTURE) -> Self:
        """Read a `config.json` mapping of a model with that head; keys of other tools are ignored.

        Both `rope_scaling` + `rope_theta` (published checkpoints) and `rope_parameters` (transformers 5) are read.
        Raises ValueError for another architecture, a missing size or an unsupported value.
        """
        model_type = values.get("model_type", "deepseek_v3")
        architectures = values.get("architectures") or [ARCHITECTURE]
        if model_type not in MODEL_TYPES or architecture not in architectures:
            raise ValueError(
                f"checkpoint from another architecture: model_type {model_type!r}, architectures {architectures!r}; "
                f"this model needs model_type 'deepseek_v3' with {architecture}"
            )
        known = {f.name for f in fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        if "dtype" not in kept and values.get("torch_dtype"):
            kept["dtype"] = values["torch_dtype"]
        if kept.get("dtype", "") is None:
            del kept["dtype"]
        if kept.get("n_shared_experts", 0) is None:
            kept["n_shared_experts"] = 0
        # transformers 5 calls the MTP depth num_mtp_layers in places; on disk both spellings occur.
        if "num_nextn_predict_layers" not in kept and values.get("num_mtp_layers") is not None:
            kept["num_nextn_predict_layers"] = values["num_mtp_layers"]
        if kept.get("num_nextn_predict_layers", 0) is None:
            kept["num_nextn_predict_layers"] = 0
        parameters = values.get("rope_parameters") or {}
        if parameters and not kept.get("rope_scaling"):
            kept["rope_scaling"] = parameters
        for source in (kept.get("rope_scaling") or {}, parameters):
            if source.get("rope_theta") is not None:
                kept["rope_theta"] = source["rope_theta"]
        missing = [f.name for f in fields(cls) if f.name not in kept and f.name in REQUIRED]
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}: add the missing sizes")
        return cls(**kept)

    @classmethod
    def from_pretrained(cls, directory: str | Path, architecture: str = ARCHITECTURE) -> Self:
        """Read `directory/config.json`. Raises ValueError when it is missing, broken or of another architecture."""
        return cls.from_json(Path(directory) / "config.json", architecture)

    @classmethod
    def from_json(cls, path: str | Path, architecture: str = ARCHITECTURE) -> Self:
        """Read a file in the form of `config.json`; errors as `from_pretrained`'s."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give a Hugging Face model directory")
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): restore the file") from error
        try:
            return cls.from_dict(values, architecture)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` mapping that transformers and vLLM load as it is.

        `topk_method` and `scoring_func` are written although transformers does not declare them: without them
        vLLM builds a softmax router without the correction bias.
        """
        values: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": "deepseek_v3"}
        values |= {f.name: getattr(self, f.name) for f in fields(self)}
        # transformers lets rope_scaling win over rope_parameters, so both say the same.
        rope = {"rope_type": "yarn" if self.rope_scaling else "default", "rope_theta": self.rope_theta}
        values["rope_parameters"] = rope | (self.rope_scaling or {})
        if self.rope_scaling is not None:
            values["rope_scaling"] = dict(values["rope_parameters"])
        return values

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `directory/config.json`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")


REQUIRED = frozenset(list(DeepseekV3Config.__dataclass_fields__)[:12])


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature sqrt(1/t) = 0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _normalise_rope_scaling(scaling: dict[str, Any] | None, max_position_embeddings: int) -> dict[str, Any] | None:
    """YaRN constants with transformers' defaults filled in; None for plain RoPE. ValueError for other types."""
    rope_type = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if not scaling or rope_type == "default":
        # A factor without a type would silently be dropped: that is a lost long-context setting, not plain RoPE.
        if scaling and scaling.get("factor"):
            raise ValueError(f"rope_scaling has factor {scaling['factor']} but no type: add `rope_type: yarn`")
        return None
    if rope_type not in ("yarn", "deepseek_yarn"):
        raise ValueError(f"rope_scaling.rope_type is {rope_type!r}: only 'yarn' or no rope_scaling is supported")
    if not scaling.get("factor"):
        raise ValueError("rope_scaling.factor is missing: give the context extension factor (V3: 40)")
    defaults = {"original_max_position_embeddings": max_position_embeddings, "beta_fast": 32, "beta_slow": 1}
    given = {key: scaling[key] for key in YARN_KEYS if scaling.get(key) is not None}
    return {"rope_type": "yarn"} | defaults | given
