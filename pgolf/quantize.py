"""Quantisation of a trained model: calibration Hessians, GPTQ codes, low-rank corrections, and the way back.

The weights come under their per-layer names (`pgolf.model.unbank`). Matrices become integer codes with a float16 scale
a row by GPTQ (arXiv 2210.17323); the matrices that lose most get a rank-4 correction (LQER, arXiv 2402.02446); small
and control tensors are kept in float16. Entry names and meta strings are those of parameter-golf PR #1874's artifact.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.kernels.dequant import LowRankFactors, dequantize
from pgolf.progress import progress

if TYPE_CHECKING:
    from pgolf.loader import Batch
    from pgolf.model import GPT

BLOCK_COLUMNS = 128  # columns GPTQ rounds before it corrects the rest in one product
DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the Hessian's mean diagonal; the first that gives a Cholesky factor counts
GRID_SHARES = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of the 2-bit scale that reaches the largest element: tried in turn
LARGEST_CLIPPED = 0.1  # share of a row's norm that clipping may take away without a warning
SMALLEST_SCALE = 2.0**-24  # float16's smallest number: a row of zeros must not divide by zero

CODES, SCALE = ".q", ".scale"
ASYMMETRIC_KEYS = (".lqA_a", ".lqAs_a", ".lqB_a", ".lqBs_a")
SYMMETRIC_KEYS = (".lqA", ".lqAs", ".lqB", ".lqBs")
PASSTHROUGH = "passthrough (float16)"


class QuantizeError(ValueError):
    """Weights or Hessians that cannot be quantised, or an artifact that does not fit the model."""


@dataclass(frozen=True)
class QuantizedModel:
    """What an artifact holds, on the CPU.

    tensors: ``NAME.q`` int8 codes and ``NAME.scale`` float16 of every matrix, ``NAME`` float16 of every tensor kept,
        then the factors of the corrections (``NAME.lqA_a`` …).
    meta: by NAME, ``gptq (int6)``, ``gptq (int6)+lqer_asym``, ``gptq (int6)+lqer`` or ``passthrough (float16)``.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, str]

    def low_rank(self, name: str) -> LowRankFactors | None:
        """The correction of matrix ``name``, if it has one."""
        for keys in (ASYMMETRIC_KEYS, SYMMETRIC_KEYS):
            if name + keys[0] in self.tensors:
                return LowRankFactors(*(self.tensors[name + key] for key in keys))
        return None


# --- Hessians ---------------------------------------------------------------------------------------------------------


def hessian_group(name: str, tied: bool = True) -> str | None:
    """The group of tensors, by their common input, whose Hessian serves tensor ``name``.

    ``blocks.3.attn.c_k.weight`` → ``blocks.3.attn.qkv``, ``tok_emb.weight`` → ``tok_emb``. With an untied head
    (``tied`` False) ``lm_head.weight`` takes ``tok_emb``, and the embedding, then only looked up, has none: None.
    """
    base = name.removesuffix(".weight")
    if base == "lm_head":
        return "tok_emb"
    if base == "tok_emb":
        return "tok_emb" if tied else None
    for projection in ("c_q", "c_k", "c_v"):
        base = base.replace(f".attn.{projection}", ".attn.qkv")
    return base


def collect_hessians(model: GPT, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Σ xᵀx over all tokens, divided by the number of batches, for the inputs x of every quantised product.

    Runs in eval mode with looping on (every pass through a looped layer counts) and puts the model back as it was.
    Sums are float32 without TF32. With several ranks each gives its own batches, and all get the average over all.

    Args:
        model: on the device to run on.
        batches: this rank's calibration batches, at least one.

    Returns one float32 [in, in] matrix a group (see `hessian_group`), on the model's device.
    Raises QuantizeError, on all ranks alike, when a rank had no batch.
    """
    sums: dict[str, Tensor] = {}

    def observe(group: str, activation: Tensor) -> None:
        x = activation.reshape(-1, activation.size(-1))
        product = _gram(x)
        sums[group] = sums[group].add_(product) if group in sums else product

    was_training, was_looping = model.training, model.looping_active
    model.eval()
    model.looping_active = True
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                model.hidden(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, observe=observe)
                count += 1
    finally:
        model.train(was_training)
        model.looping_active = was_looping
    return _average_over_ranks(sums, count, next(model.parameters()).device)


def _gram(x: Tensor) -> Tensor:
    """xᵀx in float32 without TF32, [in, in] of x [tokens, in]."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in float32, so the fast matrix units lose nothing here.
        return torch.mm(x.T, x, out_dtype=torch.float32)
    x = x.float()
    with exact_float32_products():
        return x.T @ x


def _average_over_ranks(sums: dict[str, Tensor], count: int, device: torch.device) -> dict[str, Tensor]:
    distributed = dist.is_available() and dist.is_initialized()
    tally = torch.tensor([count, count == 0], device=device, dtype=torch.int64)
    if distributed:
        dist.all_reduce(tally)
    total, idle = tally.tolist()
    if idle:
        raise QuantizeError(f"calibration needs at least one batch on every rank, and {idle} had none: check the data")
    for _, hessian in sorted(sums.items()):
        if distributed:
            dist.all_reduce(hessian)
        hessian.div_(total)
    return sums


@contextmanager
def exact_float32_products() -> Iterator[None]:
    """Matrix products of float32 tensors do not use TF32 inside."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, clip_sigmas: float, clip_range: int, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Round a matrix to integer codes so that its products with the calibration inputs change least.

    Columns are rounded in the order of falling Hessian diagonal; the error of each is made good by the columns after
    it, weighted by the Cholesky factor of the inverse Hessian. Inputs that were always zero get codes 0.

    Args:
        weight: float [rows, columns], at least 2 columns, on any device.
        hessian: float [columns, columns], symmetric, on the same device; its scale does not matter.
        clip_sigmas: a row's codes reach this many of its standard deviations.
        clip_range: largest code R; codes lie in [-R, R].
        name: what warnings call the weight.

    Returns codes int8 [rows, columns] and scales float16 [rows], clip_sigmas · std / R of the given rows.
    Raises QuantizeError for a wrong shape, a number that is not finite or a Hessian that no damping makes invertible;
    warns when it took more damping than usual, and when clipping takes much of a row away, as of a lone outlier.
    """
    _check_gptq(weight, hessian, clip_range)
    weight = weight.float()
    scales = _row_scales(weight, clip_sigmas, clip_range)
    _warn_of_clipping(name, weight, scales.float() * clip_range)
    with exact_float32_products():
        factor, order, dead = _inverse_factor(hessian, name)
        work = weight.T[order]  # a column's weights lie side by side
        work[dead] = 0
        codes = _round_columns(work, factor, scales.float(), clip_range)
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return in_order.T.contiguous(), scales


def _round_columns(work: Tensor, factor: Tensor, scale: Tensor, clip_range: int) -> Tensor:
    """Codes [columns, rows] of ``work``, the transposed and ordered weight, which is used up."""
    columns = work.size(0)
    codes = torch.empty_like(work, dtype=torch.int8)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        block, errors = work[start:stop], torch.empty_like(work[start:stop])
        within = factor[start:stop, start:stop]
        for j in range(stop - start):
            code = torch.round(block[j] / scale).clamp_(-clip_range, clip_range)
            codes[start + j] = code
            errors[j] = (block[j] - code * scale) / within[j, j]
            block[j + 1 :] -= within[j, j + 1 :, None] * errors[j]
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return codes


def _row_scales(weight: Tensor, clip_sigmas: float, clip_range: int) -> Tensor:
    scales = (clip_sigmas * weight.std(dim=1) / clip_range).clamp_min(SMALLEST_SCALE).half()
    if not torch.isfinite(scales).all():
        raise QuantizeError("a row's scale does not fit float16: its weights are too large, training has diverged")
    return scales


def _warn_of_clipping(name: str, weight: Tensor, reach: Tensor) -> None:
    lost = (weight.abs() - reach[:, None]).clamp_min(0)
    shares = (lost.norm(dim=1) / weight.norm(dim=1).clamp_min(SMALLEST_SCALE)).tolist()
    rows = [row for row, share in enumerate(shares) if share > LARGEST_CLIPPED]
    if rows:
        worst = max(rows, key=shares.__getitem__)
        others = f", and {len(rows) - 1} more rows are alike" if len(rows) > 1 else ""
        warnings.warn(
            f"{name}: clipping takes {shares[worst]:.0%} of row {worst}'s norm away, whose outlier of "
            f"{weight[worst].abs().max():.3g} codes reach only up to {reach[worst]:.3g}{others}: raise its clip_sigmas",
            stacklevel=3,
        )


def _inverse_factor(hessian: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, upper triangular with UᵀU = H⁻¹, in the order of falling diagonal; that order; its columns without input."""
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered, mean = hessian[order][:, order], diagonal.mean()
    for damping in DAMPINGS:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            if damping != DAMPINGS[0]:
                message = f"the Hessian needed damping {damping:g} instead of {DAMPINGS[0]:g}"
                warnings.warn(f"{name}: {message}", stacklevel=3)
            return factor, order, dead[order]
    raise QuantizeError(
        f"the Hessian is not positive definite even with damping {DAMPINGS[-1]:g} of its mean diagonal {mean:.3g}: "
        "it is no sum of xᵀx; check the calibration"
    )


def _check_gptq(weight: Tensor, hessian: Tensor, clip_range: int) -> None:
    if weight.ndim != 2 or weight.size(1) < 2:
        raise QuantizeError(f"weight must be [rows, columns] with at least 2 columns, got shape {list(weight.shape)}")
    columns = weight.size(1)
    if hessian.shape != (columns, columns):
        raise QuantizeError(f"hessian must be [{columns}, {columns}] like weight's columns, got {list(hessian.shape)}")
    if not 1 <= clip_range <= 127:
        raise QuantizeError(f"clip_range must be from 1 to 127 so that codes fit int8, got {clip_range}")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not torch.isfinite(tensor).all():
            raise QuantizeError(f"{name} has numbers that are not finite: training or calibration has diverged")


# --- Low-rank corrections ---------------------------------------------------------------------------------------------


def low_rank_factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation A B of ``residual`` [rows, columns]: A = U S [rows, rank], B = Vᵀ [rank, columns]."""
    left, singular, right = torch.linalg.svd(residual.float(), full_matrices=False)
    return left[:, :rank] * singular[:rank], right[:rank]


def lqer_pack(A: Tensor, B: Tensor, group: int) -> LowRankFactors:
    """Factors as two's-complement codes: A in 2 bits with one scale, B in 4 with one for every ``group`` elements.

    The scales put the largest magnitude between the ends of the uneven ranges [-2, 1] and [-8, 7], so that a largest
    element that is positive is clipped.

    Args:
        A: float [rows, rank]. B: float [rank, columns]. group: a divisor of rank · columns.

    Returns qA int8 [rows, rank], sA float16 [], qB int8 [rank, columns], sB float16 [rank · columns / group].
    Raises ValueError when group does not divide rank · columns.
    """
    if group < 1 or B.numel() % group:
        raise ValueError(f"group must divide the {B.numel()} elements of B, got {group}: use lqer_pack_symmetric")
    return LowRankFactors(*_pack_first(A), *_pack_second(B, group))


def lqer_pack_symmetric(A: Tensor, B: Tensor, bits: int = 4) -> LowRankFactors:
    """Factors as codes in ±R, R = 2^(bits-1) - 1, with one scale for every row of each.

    Args:
        A: float [rows, rank]. B: float [rank, columns]. bits: 2 to 8.

    Returns qA int8 [rows, rank], sA float16 [rows], qB int8 [rank, columns], sB float16 [rank].
    """
    return LowRankFactors(*_pack_rows(A, bits), *_pack_rows(B, bits))


def fit_low_rank(
    residual: Tensor, hessian: Tensor, rank: int, group: int | None = None, bits: int = 4
) -> LowRankFactors:
    """Packed factors that make the outputs' error tr((E - A B) H (E - A B)ᵀ) of a residual E small.

    A spans the leading left singular vectors of E H^½, along which E does most to the outputs, and is rounded on the
    grid that loses least. B is then fitted to the rounded A by least squares (for which H makes no difference) and
    rounded too. PR #1874 takes the singular vectors of E itself and rounds A with the singular values in it, so that
    its one scale serves the first column only.

    Args:
        residual: E, float [rows, columns]. hessian: H, float [columns, columns]; it is damped as in `gptq`.
        rank: of the factors. group: of the scales in `lqer_pack`; None: packed in ``bits`` as `lqer_pack_symmetric`.
    """
    exact, damped = residual.double(), hessian.double()
    damped = damped + DAMPINGS[0] * damped.diagonal().mean() * torch.eye(len(damped), device=damped.device)
    weighted = exact @ torch.linalg.cholesky(damped)
    directions = _leading_directions(weighted, rank)
    grids = [_pack_rows(directions, bits)] if group is None else [_pack_first(directions, s) for s in GRID_SHARES]
    codes, scale = max(grids, key=lambda grid: _explained(_unpacked(*grid), weighted))
    B = torch.linalg.pinv(_unpacked(codes, scale)) @ exact
    return LowRankFactors(codes, scale, *(_pack_rows(B, bits) if group is None else _pack_second(B, group)))


def outputs_error(residual: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ): the squared error of a product's outputs that a residual E [rows, columns] makes on calibration."""
    exact = residual.double()
    return float(((exact @ hessian.double()) * exact).sum())


def _leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors of the ``rank`` largest singular values, [rows, rank], by way of the smaller side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:].flip(1)
    right = torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:].flip(1)
    return torch.nn.functional.normalize(matrix @ right, dim=0)


def _explained(first: Tensor, weighted: Tensor) -> float:
    """Squared norm of the part of ``weighted`` that the columns of the first factor can give; -1 for an empty one."""
    if not first.any(dim=0).all():
        return -1.0
    return float((torch.linalg.qr(first)[0].T @ weighted).square().sum())


def _unpacked(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double().reshape(-1, 1)


def _pack_first(A: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """A in 2 bits, with ``share`` of the scale that reaches its largest element."""
    scale = (_largest(A.float().reshape(-1), 1.5).float() * share).half()
    return _codes(A, scale, -2, 1), scale


def _pack_second(B: Tensor, group: int) -> tuple[Tensor, Tensor]:
    grouped = B.float().reshape(-1, group)
    scale = _largest(grouped, 7.5)
    return _codes(grouped, scale[:, None], -8, 7).reshape(B.shape), scale


def _pack_rows(factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    clip_range = largest_code(bits)
    scale = _largest(factor.float(), clip_range)
    return _codes(factor, scale[:, None], -clip_range, clip_range), scale


def _largest(values: Tensor, code: float) -> Tensor:
    """float16 scales that put the largest magnitude of every row at ``code``."""
    return (values.abs().amax(dim=-1) / code).clamp_min(SMALLEST_SCALE).half()


def _codes(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.round(values.float() / scale.float()).clamp_(low, high).to(torch.int8)


def _pack(residual: Tensor, hessian: Tensor, config: RunConfig) -> tuple[LowRankFactors, tuple[str, ...], str]:
    """Packed factors of a residual, the keys they go under, and what the meta string says of them."""
    rank, bits = config.lqer_rank, config.lqer_factor_bits
    grouped = config.lqer_asym_enabled and rank * residual.size(1) % config.lqer_asym_group == 0
    group = config.lqer_asym_group if grouped else None
    if config.lqer_weighted:
        factors = fit_low_rank(residual, hessian, rank, group, bits)
    else:
        A, B = low_rank_factors(residual, rank)
        factors = lqer_pack(A, B, group) if grouped else lqer_pack_symmetric(A, B, bits)
    return (factors, ASYMMETRIC_KEYS, "+lqer_asym") if grouped else (factors, SYMMETRIC_KEYS, "+lqer")


def _worth_correcting(residual: Tensor, hessian: Tensor, config: RunConfig) -> float:
    """What tensors are ranked by: how much of the outputs' error a correction takes away, or the residual's norm."""
    if not config.lqer_weighted:
        return torch.linalg.vector_norm(residual).item()
    none = torch.zeros(residual.shape, dtype=torch.int8, device=residual.device)
    correction = dequantize(none, residual.new_ones(len(residual)), _pack(residual, hessian, config)[0])
    return outputs_error(residual, hessian) - outputs_error(residual - correction, hessian)


# --- A whole model ----------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How a matrix is quantised: width of its codes, and their reach in a row's standard deviations."""

    bits: int
    clip_sigmas: float


def largest_code(bits: int) -> int:
    """The largest code R of a symmetric range of ``bits`` bits: 31 for 6. Raises ValueError outside 2 to 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes must have 2 to 8 bits, got {bits}")
    return 2 ** (bits - 1) - 1


def rule_for(name: str, tensor: Tensor, config: RunConfig) -> Rule | None:
    """How tensor ``name`` is quantised; None: it stays float16, being small, a control tensor or no matrix."""
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
    """Quantise a model's tensors; see the module's docstring. No collective: one rank does it.

    Args:
        tensors: float32 weights by per-layer name, as `pgolf.model.unbank` gives them.
        hessians: by group, from `collect_hessians`.
        config: bits, clips and the settings of the correction.
        device: where the arithmetic runs.

    Raises QuantizeError for a matrix without a Hessian, and, naming the tensor, for numbers that cannot be stored.
    """
    stored: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    worth: dict[str, float] = {}
    for name in progress(tensors, description="GPTQ", unit="tensors"):
        rule = rule_for(name, tensors[name], config)
        if rule is None:
            stored[name], meta[name] = _half(name, tensors[name]), PASSTHROUGH
            continue
        weight = tensors[name].to(device, torch.float32)
        try:
            hessian = _hessian_for(name, weight, hessians, config)
            codes, scales = gptq(weight, hessian, rule.clip_sigmas, largest_code(rule.bits), name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stored[name + CODES], stored[name + SCALE] = codes.cpu(), scales.cpu()
        meta[name] = f"gptq (int{rule.bits})"
        if config.lqer_enabled:
            worth[name] = _worth_correcting(weight - dequantize(codes, scales), hessian, config)
    for name in sorted(worth, key=worth.__getitem__, reverse=True)[: config.lqer_top_k]:
        weight = tensors[name].to(device, torch.float32)
        residual = weight - dequantize(stored[name + CODES].to(device), stored[name + SCALE].to(device))
        factors, keys, mark = _pack(residual, _hessian_for(name, weight, hessians, config), config)
        stored.update({name + key: factor.cpu() for key, factor in zip(keys, factors, strict=True)})
        meta[name] += mark
    return QuantizedModel(stored, meta)


def _hessian_for(name: str, weight: Tensor, hessians: Mapping[str, Tensor], config: RunConfig) -> Tensor:
    group = hessian_group(name, tied=config.tie_embeddings)
    if group is None:  # a lookup table: rounding to the nearest code is best, which is what the identity gives
        return torch.eye(weight.size(1), device=weight.device)
    if group not in hessians:
        raise QuantizeError(
            f"there is no Hessian of group {group!r}; the calibration gave {', '.join(sorted(hessians))}"
        )
    return hessians[group].to(weight.device)


def _half(name: str, tensor: Tensor) -> Tensor:
    kept = tensor.detach().to("cpu", torch.float16)
    if not torch.isfinite(kept).all():
        raise QuantizeError(f"{name} has numbers that do not fit float16 (largest {tensor.abs().max():.3g})")
    return kept


@torch.no_grad()
def dequantize_model(quantized: QuantizedModel, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a quantised model, by the template's names and in its dtypes, on its devices.

    Args:
        template: tensors by per-layer name; only their shapes, dtypes and devices count.

    Raises QuantizeError naming the tensors that only one of the two has, or that have another shape.
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
    low_rank = quantized.low_rank(name)
    if low_rank is not None:
        low_rank = LowRankFactors(*(factor.to(like.device) for factor in low_rank))
    scale = quantized.tensors[name + SCALE].to(like.device)
    return dequantize(stored.to(like.device), scale, low_rank, dtype=like.dtype)
