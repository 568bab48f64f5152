"""Tuning the average: its gains, scales and gates are trained on, at a rate that falls to 0, while matrices stay.

An average of weights along a training is not where the small tensors fit it best, and these were trained at a rate that
never fell below ``min_lr``. A few dozen steps of AdamW mend both (docs/notes.md). It is the end of training: its data
are the next of the training shards, its seconds are the clock's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.training.checkpoint import TrainingState

BETAS = 0.9, 0.99


class AverageTuning:
    """Training of the small tensors of a state's average.

    Construction puts the average in the place of the model's weights; `end` makes the model's weights the average.
    """

    def __init__(self, state: TrainingState, config: RunConfig, world_size: int) -> None:
        self.state, self.world_size, self.rate = state, world_size, config.average_tuning_lr
        model = state.model
        self._before = {name: value.clone() for name, value in model.state_dict().items()}
        self._step, self._loader = state.step, state.loader.state_dict()
        model.load_state_dict(state.ema)
        self.tensors = [p for name, p in model.named_parameters() if not name.endswith(NOT_TUNED)]
        self.optimizer = torch.optim.AdamW(self.tensors, lr=self.rate, betas=BETAS, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, lr_scale: float) -> Tensor:
        """Average the gradients over ranks and update; return their norm, a float32 scalar on the device."""
        for tensor in self.tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in self.tensors if tensor.grad is not None]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        if self.world_size > 1:
            dist.all_reduce(flat)
            flat /= self.world_size
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * lr_scale
        self.optimizer.step()
        return flat.norm()

    def end(self) -> None:
        """Take the model's weights as the average."""
        for name, value in self.state.model.state_dict().items():
            self.state.ema[name].copy_(value)

    def undo(self) -> None:
        """Put the state back to where it was before."""
        self.state.model.load_state_dict(self._before)
        self.state.step = self._step
        self.state.loader.load_state_dict(self._loader)


NOT_TUNED = "_bank", "tok_emb.weight", "lm_head.weight"
