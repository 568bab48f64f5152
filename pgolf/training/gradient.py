"""The gradient of a step: forward and backward over its micro-batches, by Python or replayed from CUDA graphs.

A graph is captured for each loop state and each number of segments, of which the loader makes few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pgolf.data.loader import Batch
from pgolf.model.gpt import GPT
from pgolf.model.graphs import Graphs


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
        self.model, self.count = model, count
        self.parameters = list(model.parameters())
        self.loss = torch.zeros((), device=self.parameters[0].device)
        self.graphs = Graphs(self.loss.device) if graphs else None
        self.sums = [torch.empty_like(parameter) for parameter in self.parameters if graphs and count > 1]

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        """Returns the mean loss in nats, a float32 scalar on the device."""
        self.loss.zero_()
        self.model.zero_grad(set_to_none=True)
        if self.graphs is None:
            for batch in batches:
                self.loss += self._backward(batch)
            return self.loss.clone()
        for i, batch in enumerate(batches):
            loss, gradients = self._replay(batch)
            self.loss += loss
            if self.count > 1:
                (torch._foreach_add_ if i else torch._foreach_copy_)(self.sums, gradients)
        for parameter, gradient in zip(self.parameters, self.sums or gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Inside, every launch is made by Python."""
        graphs, self.graphs = self.graphs, None
        try:
            yield
        finally:
            self.graphs = graphs

    def _backward(self, batch: Batch) -> Tensor:
        loss = self.model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen) / self.count
        loss.backward()
        return loss.detach()

    def _replay(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        key = self.model.looping_active, batch.input_ids.shape, batch.cu_seqlens.numel(), batch.max_seqlen

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
            self.model.zero_grad(set_to_none=True)
            loss = self._backward(Batch(*tensors, batch.max_seqlen))
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self.model.zero_grad(set_to_none=True)
            return loss, gradients

        if key not in self.graphs:
            self.graphs.capture(key, loss_and_gradients, *batch[:3])
        return self.graphs.replay(key, *batch[:3])
