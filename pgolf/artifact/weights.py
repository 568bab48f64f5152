"""The artifact's weights as a state dict."""

from __future__ import annotations

import torch

from pgolf.artifact.container import load
from pgolf.artifact.quantize import dequantize_model
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import World
from pgolf.config import RunConfig
from pgolf.kernels.common.backend import set_backend
from pgolf.kernels.common.compiling import compiling_ahead
from pgolf.model.gpt import meta_model
from pgolf.model.weights import rebank, unbank


def load_artifact(config: RunConfig, folder: RunFolder, world: World) -> dict[str, torch.Tensor]:
    """Return the artifact's weights by state-dict name.

    Rank 0 reads the file, and each rank dequantises on its own device.
    """
    set_backend(config.kernels)
    weights = meta_model(config).state_dict()
    # Not empty_like: for a meta tensor it imports sympy, which takes seconds.
    template = {name: torch.empty(like.shape, dtype=like.dtype, device=world.device) for name, like in weights.items()}
    quantized = world.on_main(lambda: load(folder.need(folder.artifact(config), "quantize")))
    if world.device.type == "cuda":
        with compiling_ahead():  # compiling one kernel after another would take seconds
            dequantize_model(quantized, unbank(template, config.num_layers))
    return rebank(dequantize_model(quantized, unbank(template, config.num_layers)), template)
