"""Launch parameters by chip, and the properties of a device and of tensors that launches depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from .backend import INTERPRETED

TUNED = Path(__file__).parents[1] / "tuned"


def odd_addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Return each address a, in elements, as 2a + 1.

    Triton specialises integer arguments on divisibility by 16; odd values never trigger a recompilation.
    """
    return tuple(2 * (tensor.data_ptr() // tensor.element_size()) + 1 for tensor in tensors)


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which kernels compute: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a CUDA device; for a CPU an H100's, 132."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def chip(device: torch.device) -> str:
    """Return the name of a device's table of launch parameters: its own, else ``h100`` on Hopper, else ``default``.

    The interpreter takes ``default``.
    """
    if INTERPRETED:
        return "default"  # small tiles: the interpreter's time is that of the padding, too
    if device.type != "cuda":
        return "h100"  # where kernels are only compiled
    name = torch.cuda.get_device_name(device).lower()
    tables = [path.stem for path in TUNED.glob("*.json") if path.stem in name]
    return tables[0] if tables else "h100" if torch.cuda.get_device_capability(device)[0] == 9 else "default"


@lru_cache
def launch_parameters(family: str, case: str, device: torch.device) -> dict[str, int]:
    """Return the launch parameters of one case of a kernel family on this chip, from ``tuned/<chip>.json``.

    Cases that are missing there come from the H100's table. `bench.tune` measures them; a table's ``meta`` says how.
    Raises KeyError for a case in neither table.
    """
    tables = [json.loads((TUNED / f"{name}.json").read_text(encoding="utf-8")) for name in (chip(device), "h100")]
    found = [table["cases"][family][case] for table in tables if case in table["cases"].get(family, {})]
    if not found:
        raise KeyError(f"no table in {TUNED} has launch parameters for {family}, {case}")
    return found[0]
