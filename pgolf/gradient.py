"""The gradient of a step: forward and backward over its micro-batches, by Python or replayed from CUDA graphs.

A micro-batch is some thousand launches; Python makes them about as fast as an H100 works them off, and eight processes
on a busy host do not. A graph hands all of them over at once. It is captured for each loop state and each number of
segments, of which the loader makes few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.config import ConfigError, RunConfig
from pgolf.loader import Batch
from pgolf.model import GPT, attention_core


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
    batch: Batch  # what it reads
    gradients: list[Tensor]  # where it leaves the parameters' gradients


class MeanGradient:
    """Leaves the gradient of the mean loss over ``count`` micro-batches in the parameters' ``grad``.

    Graphs share one pool of memory, which stays taken as long as this object lives, and leave a micro-batch's gradients
    in it; those of several are added up in buffers.

    Args:
        model: whose parameters are float32, or bfloat16 for an embedding without a float32 master.
        count: micro-batches of one call, each of weight 1 / count.
        graphs: replay CUDA graphs; see `uses_graphs`. Micro-batches then have ``cu_seqlens``.
    """

    def __init__(self, model: GPT, count: int, graphs: bool) -> None:
        self.model, self.count, self.graphs = model, count, graphs
        self.parameters = list(model.parameters())
        self.loss = torch.zeros((), device=self.parameters[0].device)
        self._captured: dict[tuple, _Captured] = {}
        if graphs:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.loss.device)
            self.sums = [torch.empty_like(parameter) for parameter in self.parameters if count > 1]

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        """Returns the mean loss in nats, a float32 scalar on the device."""
        self.loss.zero_()
        self.model.zero_grad(set_to_none=True)
        if not self.graphs:
            for batch in batches:
                self.loss += self._backward(batch)
            return self.loss.clone()
        for i, batch in enumerate(batches):
            gradients = self._replay(batch)
            if self.count > 1:
                (torch._foreach_add_ if i else torch._foreach_copy_)(self.sums, gradients)
        for parameter, gradient in zip(self.parameters, self.sums or gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Inside, every launch is made by Python."""
        graphs, self.graphs = self.graphs, False
        try:
            yield
        finally:
            self.graphs = graphs

    def _backward(self, batch: Batch) -> Tensor:
        loss = self.model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen) / self.count
        loss.backward()
        return loss.detach()

    def _replay(self, batch: Batch) -> list[Tensor]:
        key = self.model.looping_active, batch.input_ids.shape, batch.cu_seqlens.numel(), batch.max_seqlen
        if key not in self._captured:
            self._captured[key] = self._capture(batch)
        captured = self._captured[key]
        for static, given in zip(captured.batch[:3], batch[:3], strict=True):
            static.copy_(given)
        captured.graph.replay()
        return captured.gradients

    def _capture(self, batch: Batch) -> _Captured:
        static = Batch(*(tensor.clone() for tensor in batch[:3]), batch.max_seqlen)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.loss.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._backward(static)  # compiles the kernels, which cannot be done in a capture
            self.model.zero_grad(set_to_none=True)
            # Other threads, the loader's and NCCL's, may do what this one must not.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                self.loss += self._backward(static)
        current.wait_stream(self._stream)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.model.zero_grad(set_to_none=True)
        return _Captured(graph, static, gradients)
