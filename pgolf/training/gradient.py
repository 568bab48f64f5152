"""The gradient of a step: forward and backward over its micro-batches, launched by Python or replayed from CUDA graphs.

A graph is captured for each loop state and each number of segment boundaries, of which the loader makes few.
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
    """Computes the gradient of the mean loss over ``count`` micro-batches into the parameters' ``grad``.

    Graphs leave a micro-batch's gradients in their shared memory; those of several micro-batches are summed in buffers.

    Args:
        model: with parameters in float32, or in bfloat16 for an embedding without a float32 master.
        count: micro-batches of one call, each of weight 1 / count.
        graphs: replay CUDA graphs; see `uses_graphs`. Micro-batches must then have ``cu_seqlens``.
    """

    def __init__(self, model: GPT, count: int, graphs: bool) -> None:
        self.model, self.count = model, count
        self.parameters = list(model.parameters())
        self.loss = torch.zeros((), device=self.parameters[0].device)
        self.graphs = Graphs(self.loss.device) if graphs else None
        self.sums = [torch.empty_like(parameter) for parameter in self.parameters if graphs and count > 1]

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        """Compute the gradient and return the mean loss in nats, a float32 scalar on the device."""
        self.loss.zero_()
        self.model.zero_grad(set_to_none=True)
        if self.graphs is None:
            for batch in batches:
                self.loss += self._backward(batch)
            return self.loss.clone()
        for i, batch in enumerate(batches):
            loss, gradients = self._replay(self.graphs, batch)
            self.loss += loss
            if self.count > 1:
                (torch._foreach_add_ if i else torch._foreach_copy_)(self.sums, gradients)
        for parameter, gradient in zip(self.parameters, self.sums or gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Launch everything from Python inside the context."""
        graphs, self.graphs = self.graphs, None
        try:
            yield
        finally:
            self.graphs = graphs

    def _backward(self, batch: Batch) -> Tensor:
        loss = self.model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen) / self.count
        loss.backward()
        return loss.detach()

    def _replay(self, graphs: Graphs, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        assert batch.cu_seqlens is not None
        key = self.model.looping_active, batch.input_ids.shape, batch.cu_seqlens.numel(), batch.max_seqlen

        def loss_and_gradients(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, list[Tensor]]:
            self.model.zero_grad(set_to_none=True)
            loss = self._backward(Batch(inputs, targets, cu_seqlens, batch.max_seqlen))
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self.model.zero_grad(set_to_none=True)
            return loss, gradients

        tensors = batch.input_ids, batch.target_ids, batch.cu_seqlens
        if key not in graphs:
            graphs.capture(key, loss_and_gradients, *tensors)
        return graphs.replay(key, *tensors)
