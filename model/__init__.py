"""DeepSeek-V3 family models: configuration, modules, Hugging Face checkpoints."""

from model.config import DeepseekV3Config
from model.layout import SequenceLayout
from model.modeling import DeepseekV3ForCausalLM

__all__ = ["DeepseekV3Config", "DeepseekV3ForCausalLM", "SequenceLayout"]
