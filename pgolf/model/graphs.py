"""CUDA graphs: the launches of a function of tensors, captured once and handed to the device together.

A forward and backward pass is several hundred launches. Python makes them about as fast as the device works them off,
or slower, and several processes on a busy host are slower still.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.config import ConfigError, RunConfig
from pgolf.model.gpt import GPT, attention_core


def uses_graphs(config: RunConfig, model: GPT) -> bool:
    """What ``cuda_graphs`` comes to; raises ConfigError where graphs are asked for and cannot be had."""
    device = model.qo_bank.device
    core = attention_core(config, device)
    possible = device.type == "cuda" and core != "sdpa"  # which asks the device how long segments are
    if config.cuda_graphs == "on" and not possible:
        raise ConfigError(
            f"cuda_graphs=on needs CUDA and an attention_backend other than sdpa, and this is {device.type} with "
            f"{core}; use auto or off"
        )
    return possible and (config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and model.runs_kernels()))


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # what it reads
    outputs: Any  # what it leaves


class Graphs:
    """Captured functions by key. They share one pool of memory, which stays taken as long as this object lives.

    Their stream is of high priority, so that what a function launches on another of lower fills what it leaves.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, priority=-1)
        self._captured: dict[Hashable, _Captured] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def capture(self, key: Hashable, function: Callable, *inputs: Tensor, loaded: bool = False) -> None:
        """Capture ``function`` on inputs of the given ones' shapes.

        It is called before, as kernels are compiled and loaded at their first launch, which a capture must not hold;
        ``loaded`` says that this is done.
        """
        static, graph = tuple(tensor.clone() for tensor in inputs), torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        if not loaded:
            with torch.cuda.stream(self._stream):
                function(*static)
        # Other threads, the loader's and NCCL's, may do what this one must not.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = function(*static)
        current.wait_stream(self._stream)
        self._captured[key] = _Captured(graph, static, outputs)

    def replay(self, key: Hashable, *inputs: Tensor) -> Any:
        """What the function returns of ``inputs``, in memory that the next replay of any graph may overwrite."""
        captured = self._captured[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        captured.graph.replay()
        return captured.outputs
