"""The final weights in their file, and state dicts with one tensor a layer in place of the banks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pgolf.common.files import FileError
from pgolf.common.runtime import World
from pgolf.common.tensors import TensorFileError, check_tensors, load_tensors, save_tensors
from pgolf.config import RunConfig
from pgolf.model.gpt import meta_model


def save_weights(path: Path, weights: dict[str, Tensor] | None, step: int, world: World) -> None:
    """Write rank 0's final weights, after training step ``step``, atomically; call it on every rank.

    Raises DivergedError and FileError as `save_tensors` does.
    """
    save_tensors(path, None if weights is None else {"step": step, "weights": weights}, world)


def load_weights(path: Path, config: RunConfig | None = None) -> dict[str, torch.Tensor]:
    """Read the final weights that `save_weights` wrote: float32, by state-dict name.

    Raises TensorFileError for a file that is damaged or holds anything else, including, if ``config`` is given, the
    weights of another model.
    """
    weights = load_tensors(path).get("weights")
    try:
        like = weights if isinstance(weights, dict) else {}
        if config is not None:
            like = meta_model(config).state_dict()
        return check_tensors(weights, like, torch.float32)
    except FileError as error:
        raise TensorFileError(f"{path} does not hold the weights of this run: {error}") from error


def unbank(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Split the banks of a state dict into one tensor a layer (``blocks.i.attn.c_q.weight`` …).

    Other entries are unchanged.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _BANKS:
            first, second = _BANKS[name]
            for i in range(num_layers):
                tensors[f"blocks.{i}.{first}.weight"] = value[i]
                if second:
                    tensors[f"blocks.{i}.{second}.weight"] = value[num_layers + i]
        else:
            tensors[name] = value
    return tensors


def rebank(tensors: dict[str, Tensor], template: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join tensors that `unbank` split into a state dict with the template's names, shapes and dtypes.

    Raises ValueError, naming the tensor, if one is missing or has the wrong shape.
    """
    state: dict[str, Tensor] = {}
    num_layers = template["mlp_up_bank"].size(0)
    for name, like in template.items():
        if name in _BANKS:
            parts = [_take(tensors, part, like[0].shape) for part in bank_names(name, num_layers)]
            state[name] = torch.stack(parts).to(like)
        else:
            state[name] = _take(tensors, name, like.shape).to(like)
    return state


def bank_names(bank: str, num_layers: int) -> list[str]:
    """Return the names that `unbank` gives the matrices of a bank, in the bank's order."""
    return [f"blocks.{i}.{part}.weight" for part in _BANKS[bank] if part for i in range(num_layers)]


_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc", None),
    "mlp_down_bank": ("mlp.proj", None),
}


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the weights lack {name}")
    if tensors[name].shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, and the model needs {tuple(shape)}")
    return tensors[name]
