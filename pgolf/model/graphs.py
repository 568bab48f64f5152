"""CUDA graphs: the launches of a function of tensors, captured once and replayed together.

A forward and backward pass is several hundred launches. Python issues them hardly faster than the device executes
them, and slower when several processes share a busy host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.config import ConfigError, RunConfig
from pgolf.model.gpt import GPT, attention_core


def uses_graphs(config: RunConfig, model: GPT) -> bool:
    """Return whether the model's passes are replayed from graphs, as ``cuda_graphs`` says.

    Raises ConfigError if it is ``on`` and the model cannot be captured.
    """
    device = model.qo_bank.device
    core = attention_core(config, device)
    possible = device.type == "cuda" and core != "sdpa"  # sdpa reads the segments' lengths from the device
    if config.cuda_graphs == "on" and not possible:
        raise ConfigError(
            f"cuda_graphs=on needs CUDA and an attention_backend other than sdpa, and this is {device.type} with "
            f"{core}; use auto or off"
        )
    return possible and (config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and model.runs_kernels()))


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # the tensors that it reads
    outputs: Any  # what the captured function returned


class Graphs:
    """Captured functions by key. They share one pool of memory, which is freed with this object.

    They are captured on a stream of high priority, so that work on a stream of lower priority only fills idle units.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, priority=-1)
        self._captured: dict[Hashable, _Captured] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def capture(self, key: Hashable, function: Callable, *inputs: Tensor, loaded: bool = False) -> None:
        """Capture ``function`` for inputs of these shapes.

        First calls it once, because kernels are compiled and loaded at their first launch, which must not be captured.

        Args:
            loaded: skip that call, because the kernels have been launched before.
        """
        static, graph = tuple(tensor.clone() for tensor in inputs), torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        if not loaded:
            with torch.cuda.stream(self._stream):
                function(*static)
        # thread_local: the loader's and NCCL's threads may call CUDA functions that a capture forbids.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = function(*static)
        current.wait_stream(self._stream)
        self._captured[key] = _Captured(graph, static, outputs)

    def replay(self, key: Hashable, *inputs: Tensor) -> Any:
        """Return the function's results for ``inputs``, in memory that the next replay of any graph may overwrite."""
        captured = self._captured[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.outputs
