"""Launch parameters by chip, and what a launch needs to know of its device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

TUNED = Path(__file__).parents[1] / "tuned"


def odd_addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Addresses in elements, times 2 plus 1: Triton compiles anew for integers that 16 divides and for those it does
    not, and all of these are odd."""
    return tuple(2 * (tensor.data_ptr() // tensor.element_size()) + 1 for tensor in tensors)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 132, an H100's, for a CPU that stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def chip(device: torch.device) -> str:
    """Whose table of launch parameters a device takes: its own, the H100's on other Hopper chips, else the default."""
    if device.type != "cuda":
        return "h100"  # which a CPU stands in for where kernels are interpreted or only compiled
    name = torch.cuda.get_device_name(device).lower()
    own = [path.stem for path in TUNED.glob("*.json") if path.stem in name]
    return own[0] if own else "h100" if torch.cuda.get_device_capability(device)[0] == 9 else "default"


@lru_cache
def launch_parameters(family: str, case: str, device: torch.device) -> dict[str, int]:
    """Launch parameters of one case of a kernel family on this chip, from ``tuned/<chip>.json``.

    Cases that a chip's table lacks come from the H100's; a table's ``meta`` says how its own were found, and
    `bench.tune` measures them. Raises KeyError for a case that is in neither.
    """
    tables = [json.loads((TUNED / f"{name}.json").read_text(encoding="utf-8")) for name in (chip(device), "h100")]
    found = [table["cases"][family][case] for table in tables if case in table["cases"].get(family, {})]
    if not found:
        raise KeyError(f"no table in {TUNED} has launch parameters for {family}, {case}")
    return found[0]
