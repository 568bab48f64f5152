"""The check that scoring comes first: which targets are scored, and that nothing else is learned from."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


class ScoredLedger:
    """Counts the scored targets of each document, from its start.

    Uses numbers on the host only. `score` and `train` must be called before the work that they record.
    """

    def __init__(self, predictions: np.ndarray) -> None:
        self.predictions = predictions
        self.scored = np.zeros_like(predictions)

    def score(self, documents: np.ndarray, first: np.ndarray | int, last: np.ndarray | int) -> None:
        """Record the scoring of targets [first, last) of each document. Raises RuntimeError unless they are next."""
        if (self.scored[documents] != first).any() or (last > self.predictions[documents]).any():
            raise RuntimeError("test-time training would score a target twice, or leave one out")
        self.scored[documents] = last

    def train(self, documents: np.ndarray, last: np.ndarray | int) -> None:
        """Check that targets below ``last`` may be learned from. Raises RuntimeError unless they are scored."""
        if (self.scored[documents] < last).any():
            raise RuntimeError("test-time training would learn from a target that is not scored yet")

    def train_base(self, documents: np.ndarray) -> None:
        """Check that the base may be trained on the documents. Raises RuntimeError unless all targets are scored."""
        self.train(documents, self.predictions[documents])

    def merge(self, world_size: int, device: torch.device) -> None:
        """Add what the other ranks have scored; waits for them."""
        if world_size > 1:
            everywhere = torch.from_numpy(self.scored).to(device)
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
            self.scored = everywhere.cpu().numpy()
