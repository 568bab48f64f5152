"""Quantising a trained model, and dequantising it.

The weights come under their per-layer names (`pgolf.model.weights.unbank`). Matrices become integer codes with a
float16 scale a row (`gptq`); the matrices that lose most get a correction (`low_rank`); small and control tensors are
kept in float16. Entry names and meta strings are those of parameter-golf PR #1874's artifact, but for groups of columns
with 8-bit codes (`salient_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.artifact.gptq import gptq
from pgolf.artifact.low_rank import pack_correction, worth_correcting
from pgolf.artifact.quantized import (
    CODES,
    COLUMN_STEP,
    GROUP_COLUMNS,
    PASSTHROUGH,
    ROW_STEP,
    SCALE,
    TRELLIS,
    QuantizedModel,
    QuantizeError,
    largest_code,
    scales_by_group,
)
from pgolf.artifact.steps import dequantize_codes
from pgolf.common.progress import progress
from pgolf.config import RunConfig
from pgolf.kernels.dequant import LowRankFactors, dequantize
from pgolf.model.second_moments import hessian_group


class Rule(NamedTuple):
    """How a matrix is quantised: bits of its codes, and the standard deviations that the largest code stands for."""

    bits: int
    clip_sigmas: float


def rule_for(name: str, tensor: Tensor, config: RunConfig) -> Rule | None:
    """Return how tensor ``name`` is quantised; None keeps it in float16: a small or control tensor, or no matrix."""
    patterns = [pattern.strip() for pattern in config.control_tensor_name_patterns.split(",")]
    control = any(pattern and pattern in name for pattern in patterns)
    if control or tensor.numel() <= config.gptq_passthrough_numel or tensor.ndim != 2 or not tensor.is_floating_point():
        return None
    if "tok_emb" in name:
        return Rule(config.embed_bits, config.embed_clip_sigmas)
    if ".mlp." in name:
        return Rule(config.mlp_bits or config.matrix_bits, config.mlp_clip_sigmas)
    if ".attn." in name:
        return Rule(config.attn_bits or config.matrix_bits, config.attn_clip_sigmas)
    return Rule(config.matrix_bits, config.matrix_clip_sigmas)


@torch.no_grad()
def quantize_model(
    tensors: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    config: RunConfig,
    device: torch.device | str = "cpu",
) -> QuantizedModel:
    """Quantise a model's tensors, as the module's docstring says. One rank does this alone.

    Args:
        tensors: float32 weights by per-layer name, as `pgolf.model.weights.unbank` gives them.
        hessians: by group, from `collect_hessians`.
        config: bits, clips and the settings of the correction.
        device: the device that computes.

    Raises QuantizeError for a matrix without a Hessian and, naming the tensor, for numbers that cannot be stored.
    """
    stored: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    worth: dict[str, float] = {}
    salient = salient_groups(tensors, hessians, config)
    for name in progress(tensors, description="GPTQ", unit="tensors"):
        rule = rule_for(name, tensors[name], config)
        if rule is None:
            stored[name], meta[name] = half(name, tensors[name]), PASSTHROUGH
            continue
        weight = tensors[name].to(device, torch.float32)
        try:
            hessian = hessian_for(name, weight, hessians, config)
            fine = salient.get(name, [])
            codes, scales = gptq(weight, hessian, rule.clip_sigmas, largest_code(rule.bits), name, fine)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stored[name + CODES], stored[name + SCALE] = codes.cpu(), scales.cpu()
        meta[name] = f"gptq (int{rule.bits})" + (f"+awq({','.join(map(str, fine))})" if fine else "")
        if config.lqer_enabled:
            scales = scales_by_group(scales, rule.bits, fine, codes.size(1))
            worth[name] = worth_correcting(weight - dequantize(codes, scales), hessian, config)
    for name in sorted(worth, key=worth.__getitem__, reverse=True)[: config.lqer_top_k]:
        weight = tensors[name].to(device, torch.float32)
        scales = QuantizedModel(stored, meta).scales(name).to(device)
        residual = weight - dequantize(stored[name + CODES].to(device), scales)
        factors, keys, mark = pack_correction(residual, hessian_for(name, weight, hessians, config), config)
        stored.update({name + key: factor.cpu() for key, factor in zip(keys, factors, strict=True)})
        meta[name] += mark
    return QuantizedModel(stored, meta)


def salient_groups(
    tensors: Mapping[str, Tensor], hessians: Mapping[str, Tensor], config: RunConfig
) -> dict[str, list[int]]:
    """Return which groups of 64 columns get codes of 8 bits, by matrix: the awq_groups most salient of all matrices.

    The saliency of column j is √H_jj times the mean of |w| in it, and a group's is the sum (PR #1908). In looped
    layers H has the inputs of every pass. A matrix whose columns are not a multiple of 64, or whose codes have 8 bits
    already, takes no part, and neither has a lookup table.
    """
    found = []
    for name, tensor in tensors.items() if config.awq_groups else ():
        rule, group = rule_for(name, tensor, config), hessian_group(name, tied=config.tie_embeddings)
        if rule is None or rule.bits == 8 or group is None or tensor.size(1) % GROUP_COLUMNS:
            continue
        inputs = hessian_for(name, tensor, hessians, config).diagonal().sqrt()
        saliency = (tensor.float().abs().mean(0) * inputs).view(-1, GROUP_COLUMNS).sum(1)
        found += [(score, name, number) for number, score in enumerate(saliency.tolist())]
    chosen: dict[str, list[int]] = {}
    for _, name, number in sorted(sorted(found, reverse=True)[: config.awq_groups], key=lambda each: each[1:]):
        chosen.setdefault(name, []).append(number)
    return chosen


def hessian_for(name: str, weight: Tensor, hessians: Mapping[str, Tensor], config: RunConfig) -> Tensor:
    """Return the Hessian of matrix ``name``, on the weight's device. Raises QuantizeError if there is none."""
    group = hessian_group(name, tied=config.tie_embeddings)
    if group is None:  # a lookup table: the identity makes GPTQ round to the nearest code
        return torch.eye(weight.size(1), device=weight.device)
    if group not in hessians:
        raise QuantizeError(
            f"there is no Hessian of group {group!r}; the calibration gave {', '.join(sorted(hessians))}"
        )
    return hessians[group].to(weight.device)


def half(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in float16, on the CPU. Raises QuantizeError, naming it, for numbers that do not fit."""
    kept = tensor.detach().to("cpu", torch.float16)
    if not torch.isfinite(kept).all():
        raise QuantizeError(f"{name} has numbers that do not fit float16 (largest {tensor.abs().max():.3g})")
    return kept


@torch.no_grad()
def dequantize_model(quantized: QuantizedModel, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a quantised model's weights by per-layer name, in the template's dtypes and on its devices.

    Args:
        template: tensors by per-layer name, of which only shapes, dtypes and devices are read.

    Raises QuantizeError, naming the tensors, if only one of the two has them or their shapes differ.
    """
    if quantized.meta.keys() != template.keys():
        missing, foreign = template.keys() - quantized.meta.keys(), quantized.meta.keys() - template.keys()
        raise QuantizeError(
            "the artifact was made with other model settings: it lacks "
            f"{', '.join(sorted(missing)) or 'nothing'} and has {', '.join(sorted(foreign)) or 'nothing'} besides"
        )
    return {name: _dequantized(quantized, name, like) for name, like in template.items()}


def _dequantized(quantized: QuantizedModel, name: str, like: Tensor) -> Tensor:
    kept = quantized.tensors.get(name)
    stored = quantized.tensors[name + CODES] if kept is None else kept
    if stored.shape != like.shape:
        raise QuantizeError(
            f"{name} is {list(stored.shape)} in the artifact and {list(like.shape)} in the model: the artifact was "
            "made with other model settings"
        )
    if kept is not None:
        return kept.to(like)
    if mark := TRELLIS.fullmatch(quantized.meta[name]):
        rows, columns = (quantized.tensors[name + key] for key in (ROW_STEP, COLUMN_STEP))
        return dequantize_codes(stored.to(like.device), rows, columns, states=int(mark[1])).to(like.dtype)
    low_rank = quantized.low_rank(name)
    if low_rank is not None:
        low_rank = LowRankFactors(*(factor.to(like.device) for factor in low_rank))
    return dequantize(stored.to(like.device), quantized.scales(name).to(like.device), low_rank, dtype=like.dtype)
