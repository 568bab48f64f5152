"""An artifact in another format: entropy-coded, the public one, or plain weights for other programs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pgolf.artifact.container import COMPRESSOR, PACKED, PUBLIC, ArtifactError, load, save
from pgolf.artifact.quantize import dequantize_model
from pgolf.artifact.quantized import CODES, QuantizedModel
from pgolf.common.files import write_aside

WEIGHTS = ".safetensors"


def convert(source: str | os.PathLike, target: str | os.PathLike, compressor: str = COMPRESSOR) -> int:
    """Write the artifact ``source`` as ``target``, in the format of its ending, and return its bytes.

    ``.pgolf`` and ``.int6.ptz`` hold the same codes to the bit. ``.safetensors`` holds the weights that they stand for,
    float32 by per-layer name, which no longer are an artifact.

    Raises ArtifactError for a source that is no artifact, a target that exists or cannot hold it, and a compressor that
    it does not use; ImportError if
    safetensors is asked for and not installed.
    """
    target = Path(target)
    if target.exists():
        raise ArtifactError(f"{target} is there already: delete it, or name another file")
    if str(source).endswith(WEIGHTS):
        raise ArtifactError(f"{source} holds weights, which have no codes: convert an artifact, .pgolf or .int6.ptz")
    if not target.name.endswith((PACKED, PUBLIC, WEIGHTS)):
        raise ArtifactError(f"{target} must end in {PACKED}, {PUBLIC} or {WEIGHTS}, which says its format")
    if compressor != COMPRESSOR and not target.name.endswith(PUBLIC):
        raise ArtifactError(f"--compressor is of {PUBLIC} files, and {target} is none")
    quantized = load(source)
    if not target.name.endswith(WEIGHTS):
        return save(target, quantized, compressor)
    try:
        from safetensors.torch import save as serialize
    except ImportError as error:
        raise ImportError("weights as .safetensors need `pip install safetensors`, or 'pgolf[convert]'") from error
    write_aside(target, serialize(weights(quantized), {"format": "pt"}))
    return target.stat().st_size


def weights(quantized: QuantizedModel) -> dict[str, torch.Tensor]:
    """Return the weights that a quantised model stands for, float32 by per-layer name."""
    shapes = {name: quantized.tensors.get(name, quantized.tensors.get(name + CODES)) for name in quantized.meta}
    template = {name: torch.empty(like.shape) for name, like in shapes.items() if like is not None}
    return dequantize_model(quantized, template)
