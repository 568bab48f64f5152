"""The bytes of an artifact: expected before training, with its program against the cap, and by class of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.artifact.container import CAP_BYTES, ArtifactError
from pgolf.artifact.quantize import rule_for
from pgolf.artifact.quantized import (
    CODES,
    COLUMN_STEP,
    ROW_STEP,
    SCALE,
    TRELLIS,
    QuantizedModel,
    is_trellised,
    largest_code,
)
from pgolf.config import ConfigError, RunConfig
from pgolf.model.gpt import meta_model
from pgolf.model.weights import unbank
from pgolf.submission.export import exported_program

LEAST_BITS = 1.8  # a weight at steps of a standard deviation: 2.05 of a Gaussian distribution, less of a longer-tailed
MOST_BITS = 7.1  # at the finest steps
SHRINK_FIELDS = (
    "lower weight_bytes; with quantizer=gptq raise embed_clip_sigmas, mlp_clip_sigmas or attn_clip_sigmas, or lower "
    "embed_bits or lqer_top_k"
)
_CODE_CLASSES = {"tok_emb": "embedding", ".attn.": "attention", ".mlp.fc": "mlp fc", ".mlp.proj": "mlp proj"}
_CLASS_ORDER = [*_CODE_CLASSES.values(), "other matrices", "scales", "low-rank factors", "small tensors"]


@dataclass(frozen=True)
class ArtifactSize:
    """The bytes that count for the challenge: the weights' file, the program's file, and the cap on their sum."""

    weight_bytes: int
    code_bytes: int
    cap_bytes: int = CAP_BYTES

    @property
    def total_bytes(self) -> int:
        """The bytes of weights and code."""
        return self.weight_bytes + self.code_bytes

    @property
    def share(self) -> float:
        """The total divided by the cap."""
        return self.total_bytes / self.cap_bytes

    @property
    def margin_bytes(self) -> int:
        """The bytes left under the cap; negative if the total exceeds it."""
        return self.cap_bytes - self.total_bytes

    def check(self) -> None:
        """Raise ArtifactError, naming the settings that shrink the weights, if the total exceeds the cap."""
        if self.margin_bytes < 0:
            raise ArtifactError(
                f"the artifact is {-self.margin_bytes:,} bytes over the cap: weights {self.weight_bytes:,} + code "
                f"{self.code_bytes:,} = {self.total_bytes:,} of {self.cap_bytes:,}. To shrink it, {SHRINK_FIELDS}"
            )


def expected_size(config: RunConfig) -> str:
    """Say, before there are weights, how many bytes they will take.

    With quantizer=trellis these are the bytes that are asked for. With quantizer=gptq they follow from the bits and
    clips: weights of a Gaussian distribution have codes of log2(largest code / clip √(2πe)) bits. Files are within 2 %.

    Raises ConfigError if no steps of quantizer=trellis give so few bytes, and if no tensor is quantised.
    """
    bits, weights, kept = 0.0, 0, 0
    for name, tensor in unbank(meta_model(config).state_dict(), config.num_layers).items():
        if (rule := rule_for(name, tensor, config)) is None:
            kept += tensor.numel()
            continue
        weights += tensor.numel()
        # Their scales are float16, one a row.
        bits += tensor.numel() * math.log2(largest_code(rule.bits) / rule.clip_sigmas * math.sqrt(2 * math.pi * math.e))
        bits += 16 * tensor.size(0)
    if not weights:
        raise ConfigError("no tensor has enough numbers to be quantised: lower gptq_passthrough_numel")
    if config.quantizer == "trellis":
        size = config.weight_bytes or CAP_BYTES
        program = "" if config.weight_bytes else " with its program"
        each = (8 * size - 16 * kept) / weights
        share = f"{size:,} bytes{program} are {each:.2f} bits for each of {weights:,} weights"
        if each < LEAST_BITS:
            raise ConfigError(
                f"{share}, and the coarsest steps take more than {LEAST_BITS:g}: choose a smaller model (num_layers, "
                "model_dim, mlp_mult), or with weight_bytes an artifact over the cap"
            )
        if each > MOST_BITS:
            return f"the artifact will take less than {size:,} bytes: {weights:,} weights at their finest steps"
        over = ""
        if config.weight_bytes and (together := size + len(exported_program(config))) > CAP_BYTES:
            over = f", with its program {together:,}, more than the cap of {CAP_BYTES:,}"
        return f"the artifact will take {size:,} bytes{program}{over}, {each:.2f} bits for each of {weights:,} weights"
    size = round(bits / 8 + 2 * kept)
    over = "" if size <= CAP_BYTES else f", more than the cap of {CAP_BYTES:,}: {SHRINK_FIELDS}"
    return f"the artifact is expected to take {size:,} bytes without its program{over}"


class ClassSize(NamedTuple):
    """One row of an artifact's table: a class of tensors.

    Attributes:
        name: ``embedding``, ``attention``, ``mlp fc``, ``mlp proj``, ``other matrices``, ``scales``,
            ``low-rank factors`` or ``small tensors``.
        stored: the type of its numbers, such as ``int6`` or ``float16``.
        tensors, numbers: how many there are.
        bits_per_number: for codes the order-0 entropy, averaged over numbers; else the bits before compression.
        bytes: numbers · bits_per_number / 8, rounded.
    """

    name: str
    stored: str
    tensors: int
    numbers: int
    bits_per_number: float
    bytes: int


def code_entropy(codes: Tensor) -> float:
    """Return the order-0 entropy of codes in bits a code: the least that a coder without context needs."""
    counts = torch.bincount(codes.reshape(-1).int() - int(codes.min())).double()
    shares = counts[counts > 0] / codes.numel()
    return float(-(shares * shares.log2()).sum())


def trellis_entropy(codes: Tensor) -> float:
    """Return the bits a code that codes on a trellis take without context: the parity is known, and costs nothing."""
    odd = (codes & 1).bool()
    parts = [codes[chosen] for chosen in (odd, ~odd) if chosen.any()]
    return sum(code_entropy(part) * part.numel() for part in parts) / codes.numel()


def matrix_entropy(codes: Tensor, how: str) -> float:
    """Return the order-0 entropy of a matrix's codes in bits a code; ``how`` is its mark in `QuantizedModel.meta`."""
    return trellis_entropy(codes) if is_trellised(how) else code_entropy(codes)


def class_of(name: str) -> str:
    """Return the class of a matrix of codes, as `ClassSize` names it."""
    return next((kind for part, kind in _CODE_CLASSES.items() if part in name), "other matrices")


def class_sizes(quantized: QuantizedModel) -> list[ClassSize]:
    """Return an artifact's table by class of tensors, codes first; see `ClassSize` for the estimates."""
    members: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for name, stored, numbers, bits in _entries(quantized):
        members.setdefault((name, stored), []).append((numbers, bits))
    rows = []
    for (name, stored), entries in members.items():
        numbers, bits = sum(count for count, _ in entries), sum(bits for _, bits in entries)
        rows.append(ClassSize(name, stored, len(entries), numbers, bits / max(numbers, 1), round(bits / 8)))
    return sorted(rows, key=lambda row: (_CLASS_ORDER.index(row.name), row.stored))


def bytes_by_class(quantized: QuantizedModel) -> dict[str, int]:
    """Return the bytes of each class of tensors, estimated as `ClassSize` says."""
    sizes: dict[str, int] = {}
    for row in class_sizes(quantized):
        sizes[row.name] = sizes.get(row.name, 0) + row.bytes
    return sizes


def _entries(quantized: QuantizedModel) -> Iterator[tuple[str, str, int, float]]:
    """Yield class, type of the numbers, their count, and their bits together, for each stored tensor."""
    for key, tensor in quantized.tensors.items():
        stored, raw = str(tensor.dtype).removeprefix("torch."), 8.0 * tensor.numel() * tensor.element_size()
        if key in quantized.meta:
            yield "small tensors", stored, tensor.numel(), raw
        elif key.endswith(CODES):
            how = quantized.meta[key.removesuffix(CODES)]
            mark = TRELLIS.fullmatch(how)
            width = "trellis" if mark else how.partition("(")[2].partition(")")[0]
            yield class_of(key), width, tensor.numel(), matrix_entropy(tensor, how) * tensor.numel()
        else:
            yield (
                "scales" if key.endswith((SCALE, ROW_STEP, COLUMN_STEP)) else "low-rank factors",
                stored,
                tensor.numel(),
                raw,
            )
