"""Memory of loading and converting a sharded checkpoint. Writes results/load_memory.json.

    python -m benchmarks.load_memory

Each action has a process of its own, which first does the same to a tiny model: imports and thread pools are its
baseline, not the checkpoint's doing. This process reads RssAnon of the other from /proc every millisecond, so no
interpreter lock hides a peak. Mapped files are not counted: the kernel drops those pages when it likes. The peer is
transformers' from_pretrained on the same directory. The figures do not depend on what else the machine does.
"""

from __future__ import annotations

import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CACHE, ROOT, alternate, machine, write_result
from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.convert import convert_checkpoint

CLAIM = (
    "Anonymous memory above the process's own baseline peaks at no more than 1.15 times the weights that are made plus "
    "the largest shard when a sharded checkpoint is loaded, and at no more than one shard when it is converted."
)
SHARDS = 8  # about, in a checkpoint
# Action -> (form of the source, form of what is made)
ACTIONS = {
    "load bf16": ("bf16", "bf16"),
    "load fp8": ("fp8", "bf16"),
    "convert bf16": ("bf16", "fp8"),
    "convert fp8": ("fp8", "bf16"),
    "transformers, load bf16": ("bf16", "bf16"),
}


def make_checkpoints(folder: Path, hidden_size: int, experts: int) -> None:
    """folder/{bf16,fp8}: one random model with ten MoE layers and an MTP layer, in shards."""
    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        moe_intermediate_size=hidden_size // 2, num_hidden_layers=11, num_attention_heads=8, n_routed_experts=experts,
        num_experts_per_tok=2, kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=32, n_group=1, topk_group=1, first_k_dense_replace=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    for form, scale_fmt, size in (("bf16", None, 2), ("fp8", "float", 1)):
        shard = size * model.num_parameters // SHARDS
        model.save_pretrained(folder / form, max_shard_bytes=shard, scale_fmt=scale_fmt)


def act(action: str, source: Path, out: Path) -> Any:
    """What is measured; the caller keeps the result alive."""
    if action.startswith("convert"):
        scale_fmt = "float" if ACTIONS[action][1] == "fp8" else None
        shard = sum(shards(source)) * (2 if scale_fmt is None else 1) // SHARDS
        return convert_checkpoint(source, out, scale_fmt, max_shard_bytes=shard)
    if action.startswith("transformers"):
        from transformers import DeepseekV3ForCausalLM as TransformersModel

        return TransformersModel.from_pretrained(source, dtype=torch.bfloat16)
    return DeepseekV3ForCausalLM.from_pretrained(source)


def child(action: str, source: Path, tiny: Path, out: Path) -> None:
    """Warms up, says so, waits for a line; acts, says so, waits for a line."""
    act(action, tiny, out / "tiny")
    print("ready", flush=True)
    sys.stdin.readline()
    result = act(action, source, out / "full")
    print("done", flush=True)
    sys.stdin.readline()
    del result


def shards(directory: Path) -> list[int]:
    """Bytes of each."""
    return [path.stat().st_size for path in directory.glob("*.safetensors")]


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


def measure(action: str, folder: Path, tiny: Path) -> dict[str, Any]:
    """Peak of one action on the checkpoints that make_checkpoints wrote to `folder`, and what it may be."""
    source, target = (folder / form for form in ACTIONS[action])
    out = folder / "out"
    command = [sys.executable, "-m", "benchmarks.load_memory", action, source, tiny / source.name, out]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{action} on {tiny} failed; its error is above")
        baseline = peak = anonymous_bytes(process.pid)
        print(file=process.stdin, flush=True)
        while not select.select([process.stdout], [], [], 0.001)[0]:
            peak = max(peak, anonymous_bytes(process.pid))
        if process.stdout.readline() != "done\n":
            raise RuntimeError(f"{action} on {folder} failed; its error is above")
        peak = max(peak, anonymous_bytes(process.pid))
    largest = max(shards(source) + shards(out / "full"))
    shutil.rmtree(out, ignore_errors=True)
    weights = sum(shards(target))
    return {
        "weights_bytes": weights,
        "largest_shard_bytes": largest,
        "baseline_bytes": baseline,
        "peak_bytes": peak - baseline,
        "peak_over_weights": round((peak - baseline) / weights, 3),
        "peak_over_largest_shard": round((peak - baseline) / largest, 3),
        "allowed": round(1.15 + largest / weights, 3),  # of peak_over_weights
    }


def main() -> None:
    before = machine()
    folder, tiny = CACHE / "load_memory", CACHE / "load_memory_tiny"
    make_checkpoints(folder, hidden_size=1024, experts=32)
    make_checkpoints(tiny, hidden_size=64, experts=2)
    rounds = alternate({action: lambda action=action: measure(action, folder, tiny) for action in ACTIONS})
    for action, results in rounds.items():
        worst = max(results, key=lambda result: result["peak_bytes"])
        print(f"{action}: {worst['peak_over_weights']} x weights, {worst['peak_over_largest_shard']} x largest shard")
    print(write_result("load_memory", CLAIM, before, rounds))
    for path in (folder, tiny):
        shutil.rmtree(path)  # more than a gigabyte


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], *map(Path, sys.argv[2:5]))
    else:
        main()
