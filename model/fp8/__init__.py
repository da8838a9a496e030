"""FP8 (E4M3) with one scale a block: the released weights' format, and what FP8 training computes with."""

from model.fp8.quantize import BLOCK, dequantize_blocks, quantize_blocks, scale_shape

__all__ = ["BLOCK", "dequantize_blocks", "quantize_blocks", "scale_shape"]
