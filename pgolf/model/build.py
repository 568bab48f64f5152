"""Building a model on the run's device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pgolf.common.runtime import World
from pgolf.config import RunConfig
from pgolf.kernels.common.backend import set_backend
from pgolf.model.gpt import GPT, meta_model


def build_model(config: RunConfig, world: World, weights: Mapping[str, torch.Tensor] | None = None) -> GPT:
    """Build the model on the run's device, and select the kernels that the settings ask for.

    Args:
        weights: by state-dict name; the model takes copies. None draws weights, which takes seconds.
    """
    set_backend(config.kernels)
    if weights is None:
        return GPT(config).to(world.device)
    model = meta_model(config)
    types = {name: value.dtype for name, value in model.state_dict().items()}
    copies = {name: value.to(world.device, types.get(name), copy=True) for name, value in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model.to(world.device)


def model_with(config: RunConfig, world: World, weights: dict[str, torch.Tensor]) -> GPT:
    """Build the model with these weights as it is after training: with the loop on, if there is one, in eval mode."""
    model = build_model(config, world, weights)
    model.looping_active = config.num_loops > 0
    return model.eval()
