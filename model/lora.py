"""LoRA (arXiv 2106.09685) by peft: adapters W + (lora_alpha / r) B A on the matrices of a model's decoder layers.

Invariant: base weights never change. Merged weights, which checkpoints and most engines get, are made one tensor at a
time and given away; nothing is merged in place, so nothing has to be taken out again.

By default matrices are targeted as parameters (peft's `target_parameters`; stacked experts cannot be otherwise). The
forward pass then multiplies by the merged matrix, rounded to the model's dtype: bit for bit what an engine gets. A
linear layer in `target_modules` adds B A x to W x instead, which is cheaper, but in BF16 not what the engine computes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.family import AnyConfig, AnyModel, empty_model, published_state
from model.modeling import DeepseekV3PreTrainedModel
from model.names import from_hf, load_hf_state

FOLDER = "adapter"  # of a checkpoint: PEFT's files, beside the merged weights
WEIGHTS, BASE = "adapter_model.safetensors", "base.json"


class LoraAdapter:
    """A fresh adapter on a model, which is changed in place: peft's layers stand around those of the model.

    Only the adapter's parameters require gradients; they are float32 whatever dtype the model has. B starts at 0.
    """

    def __init__(self, model: AnyModel, options: Mapping[str, Any], base_dir: str | Path = "", seed: int = 0) -> None:
        """options: fields of peft's LoraConfig. base_dir: where the weights came from, written into the adapter.

        MTP layers get no adapter: transformers' model, on which it must load too, has none. Raises ValueError where
        peft is missing, and for a target that names nothing or something else than a matrix of a decoder layer.
        """
        try:
            from peft import LoraConfig, PeftModel
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError as err:
            raise ValueError("model.lora is set, but peft is not installed; pip install 'grpo-v3[lora]'") from err
        self.config = LoraConfig(**{**options, **_targets(model, options)}, task_type="CAUSAL_LM")
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), _without_mtp(model):
            torch.manual_seed(seed)
            self.peft = PeftModel(model, self.config)  # type: ignore[arg-type]
        self.config.base_model_name_or_path = str(Path(base_dir).resolve()) if base_dir else None
        layers = {
            f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}": module
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        self.merged = MergedModel(model, layers)

    def off(self) -> AbstractContextManager[None]:
        """While it lasts the model is the base, to the last bit."""
        return self.peft.disable_adapter()

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters under PEFT's names."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.peft, save_embedding_layers=False)

    def unmerged(self) -> Iterator[tuple[str, Tensor]]:
        """The base under published names, then the adapter under PEFT's: together what the model computes with."""
        yield from published_state(MergedModel(self.merged.model, {}))
        yield from self.tensors().items()

    def save(self, directory: str | Path) -> None:
        """Writes `directory/adapter/` in PEFT's format: `PeftModel.from_pretrained(base model, directory/adapter)`."""
        folder = Path(directory) / FOLDER
        self.config.save_pretrained(str(folder))  # PeftModel.save_pretrained would add an empty model card
        save_file(self.tensors(), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / BASE).write_text(json.dumps({"sha256": self.merged.base_digest()}))

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Takes over a checkpoint: its adapter, and what that does not sit on (router biases may have moved).

        Raises ValueError for a checkpoint without an adapter, with one of another form, or made on other base weights.
        """
        folder = Path(directory) / FOLDER
        if not (folder / BASE).is_file():
            raise ValueError(f"{directory} has no {FOLDER}/: it was trained without model.lora; set that to null")
        if json.loads((folder / BASE).read_text())["sha256"] != self.merged.base_digest():
            raise ValueError(f"{folder} was trained on other base weights than this model's; restore those")
        saved, own = load_file(folder / WEIGHTS), self.tensors()
        theirs, ours = json.loads((folder / "adapter_config.json").read_text()), self.config.to_dict()
        shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (saved, own)]
        if shapes[0] != shapes[1] or theirs["lora_alpha"] != ours["lora_alpha"]:
            found, asked = (f"r {c['r']}, lora_alpha {c['lora_alpha']}" for c in (theirs, ours))
            raise ValueError(
                f"{folder} has {found} and {len(saved)} tensors; model.lora gives {asked} and {len(own)}: "
                "keep what the run began with"
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        if isinstance(self.merged.model, DeepseekV3PreTrainedModel):  # elsewhere nothing but the adapter moves
            self.merged.load_unadapted(Checkpoint(directory).read())


class MergedModel(Mapping[str, Tensor]):
    """The model as if its adapter were part of its weights: in-memory name -> tensor, merged when it is asked for.

    Its own `state_dict()`, so that names and checkpoints take it for a model.
    """

    def __init__(self, model: AnyModel, layers: Mapping[str, Any]) -> None:
        """layers: in-memory name of each adapted matrix -> peft's layer."""
        self.model, self.layers = model, layers
        self.config: Any = model.config
        # in-memory name -> name among peft's layers; taken once, as peft's forward pass reorders a module's parameters
        self.places = {_plain(name): name for name in model.state_dict() if ".lora_" not in name}

    def state_dict(self) -> Mapping[str, Tensor]:
        return self

    def __getitem__(self, name: str) -> Tensor:
        return merged_weight(self.layers[name]) if name in self.layers else self.base(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def base(self, name: str) -> Tensor:
        """The tensor without its adapter; no copy."""
        module, _, leaf = self.places[name].rpartition(".")
        return getattr(self.model.get_submodule(module), leaf).detach()

    def load_unadapted(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """Loads, of (published name, tensor) pairs, those that no adapter sits on. ValueError if one is missing."""
        places = ((pair, from_hf(pair[0], self.config)) for pair in pairs)
        others = (pair for pair, place in places if place is not None and place[0] not in self.layers)
        missing = [name for name in load_hf_state(self, others, strict=False).missing if name not in self.layers]
        if missing:
            raise ValueError(f"{', '.join(missing[:3])} missing from the weights: use a complete checkpoint")

    def base_digest(self) -> str:
        """Of the first 1024 numbers of every adapted matrix: enough to tell one base from another."""
        digest = hashlib.sha256()
        for name in self.layers:
            digest.update(name.encode())
            digest.update(self.base(name).flatten()[:1024].cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """Base plus adapter of one of peft's layers: a new tensor of the base's shape and dtype."""
    base = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        with layer._activate_lora(layer.active_adapters):  # as its forward pass does, so the same bits
            return getattr(base, layer.parameter_name)
    return base.weight + layer.get_delta_weight("default").to(base.weight.dtype)


def adapter_shapes(config: AnyConfig, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """PEFT name -> shape of every tensor of an adapter, without any weights. Raises what LoraAdapter would."""
    with torch.device("meta"):
        tensors = LoraAdapter(empty_model(config), options).tensors()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@contextmanager
def _without_mtp(model: AnyModel) -> Iterator[None]:
    """While it lasts the MTP layers are out of peft's sight."""
    if not isinstance(model, DeepseekV3PreTrainedModel):
        yield
        return
    mtp_layers, model.mtp_layers = model.mtp_layers, nn.ModuleList()
    yield
    model.mtp_layers = mtp_layers


def _plain(name: str) -> str:
    """A name as it is without peft's layers."""
    return name.replace(".base_layer", "")


def _targets(model: AnyModel, options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Both kinds of targets, checked. Where none are given: every matrix of a decoder layer but the router's."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("mtp_layers.")]
    matrices = {
        name: layer[1]  # what follows model.layers.N.
        for name in names
        if (layer := re.search(r"\.(?:layers|h)\.\d+\.(.+)", name))
        and model.get_parameter(name).dim() > 1
        and not name.endswith(".mlp.gate.weight")
    }
    stacked = any(".experts." in name for name in matrices)
    choices = sorted(set(matrices.values()))
    modules, parameters = (list(options.get(key) or []) for key in ("target_modules", "target_parameters"))
    if not modules and not parameters:
        return {"target_modules": [], "target_parameters": choices}
    seen: set[str] = set()
    for target in (*(f"{module}.weight" for module in modules), *parameters):
        hits = [name for name in names if f".{name}".endswith(f".{target}")]
        other = next((name for name in hits if name not in matrices), None)
        if not hits or other or seen & set(hits):
            what = other or ("a matrix for the second time" if hits else "nothing")
            raise ValueError(f"model.lora target {target!r} names {what}; adapters can sit on {', '.join(choices)}")
        seen |= set(hits)
    for module in modules:
        hit = next((name for name in matrices if ".mlp." in name and f".{name}".endswith(f".{module}.weight")), None)
        if hit and stacked:
            # with transformers 5 peft renames them, as this family's experts are stacked there: the adapter would load
            # on the routed experts and say nothing
            raise ValueError(
                f"model.lora.target_modules: peft takes {module!r} for the routed experts of this family; "
                f"name {matrices[hit]} in target_parameters"
            )
    return {"target_modules": modules, "target_parameters": parameters}
