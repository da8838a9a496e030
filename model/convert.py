"""A model directory from one form of weights to another, BF16 or FP8, as a stream: memory for one tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from model.checkpoint import SCALE_FORMATS, SHARD_BYTES, Checkpoint, quantization_config, released_form, released_layout
from model.modeling import DeepseekV3ForCausalLM
from model.shards import write_shards

WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    scale_fmt: str | None,
    max_shard_bytes: int = SHARD_BYTES,
    written: Callable[[str, int, int], None] = lambda file, done, total: None,
) -> None:
    """Write the weights of `source` to `out` in another form.

    scale_fmt None gives BF16, "float" or "ue8m0" the released FP8 form. MTP layers come along; config.json keeps every
    other key, and files that are no weights (tokenizer, generation config, code) are copied. config.json comes last, so
    a directory that has one is whole. written(file, bytes so far, bytes in all) is called after each shard.

    Raises ValueError, before anything is written, when the source does not fit its config, `out` is not empty, or
    the disk has no room.
    """
    source, out = Path(source), Path(out)
    if scale_fmt not in (None, *SCALE_FORMATS):
        raise ValueError(f"scale_fmt is {scale_fmt!r}: use {' or '.join(SCALE_FORMATS)}, or None for BF16")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {str(out)!r} is not empty; choose another directory")
    checkpoint = Checkpoint(source)
    with torch.device("meta"):
        checkpoint.check(DeepseekV3ForCausalLM(checkpoint.config))
    shapes = ((name, stored.shape) for name, stored in checkpoint.weights.items())
    layout = list(released_layout(shapes, scale_fmt))
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < (needed := sum(spec.nbytes for spec in layout)):
        raise ValueError(f"--out {str(out)!r} has {free / 1e9:.1f} GB free: the weights need {needed / 1e9:.1f} GB")
    write_shards(out, layout, released_form(checkpoint.read(), scale_fmt), max_shard_bytes, written)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(WEIGHT_SUFFIXES):
            shutil.copy2(path, out / path.name)
    values = {key: value for key, value in checkpoint.values.items() if key != "quantization_config"}
    values["dtype" if "dtype" in values else "torch_dtype"] = "bfloat16"
    # True to what is saved: transformers takes 1 where the key is absent, and drops MTP layers without correcting it.
    values.pop("num_mtp_layers", None)
    values["num_nextn_predict_layers"] = checkpoint.config.num_nextn_predict_layers
    if scale_fmt:
        values["quantization_config"] = quantization_config(scale_fmt)
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")
