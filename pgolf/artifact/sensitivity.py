"""How much the loss grows when weights are rounded: Fisher information from gradients of sampled labels.

For independent errors of variance v on the weights of row r of a matrix W, the loss grows by

    ½ v Σ_c E[(∂L / ∂W_rc)²]                                     nats a token, labels drawn from the model itself

in the mean, as cross-entropy and Kullback-Leibler divergence do to second order. GPTQ makes the errors of a row depend
on each other through the inputs' second moments H; then v has the factor d_j² / (tr H / columns), d_j the pivot of
column j (`pgolf.artifact.rate`). Measured on the record model, the sum over all matrices predicts the divergence
to 15 %.

A row of the embedding works twice: in the head, where an error δ moves its logit by h·δ, which costs
½ E[p (1 - p) (dz/dl)²] (h·δ)² with p its probability and z the capped logit l; and as an input, for its share of
tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pgolf.common.runtime import World
from pgolf.config import RunConfig
from pgolf.data.loader import segment_boundaries
from pgolf.kernels.linear_cross_entropy import softcapped
from pgolf.model.gpt import GPT, evaluation_mode
from pgolf.model.graphs import Graphs, uses_graphs
from pgolf.model.weights import unbank


class Sensitivities(NamedTuple):
    """Second derivatives of the loss, nats a token, float64 on the CPU.

    Attributes:
        rows: by per-layer name, [R]: Σ_c E[(∂L / ∂W_rc)²] of every matrix; of the embedding its part as an input.
        head: [V]: E[p (1 - p) (dz/dl)²] E[|h|²], the second derivative by a head row's errors, summed over columns.
    """

    rows: dict[str, Tensor]
    head: Tensor


def collect_sensitivities(model: GPT, config: RunConfig, tokens: Tensor, world: World) -> Sensitivities:
    """Average squared gradients over ``sensitivity_sequences`` sequences, which the ranks share.

    Sequences are cut anywhere; attention stops at the documents' boundaries in them, as in training.

    Args:
        model: with float32 weights, whose gradients are taken; they are None afterwards.
        tokens: int [N] of training data, the same on every rank.

    Raises ValueError if there are too few tokens for one sequence.
    """
    count, length = config.sensitivity_sequences, config.sensitivity_tokens
    if len(tokens) <= length:
        raise ValueError(f"sensitivities need more than {length} training tokens, got {len(tokens)}")
    generator = torch.Generator().manual_seed(config.seed)
    starts = torch.randint(0, len(tokens) - length, (count,), generator=generator).tolist()
    sequences = [tokens[start : start + length].long().cpu() for start in starts]
    bounds = [segment_boundaries(ids, length) for ids in sequences]
    entries = max(map(len, bounds))  # of one graph
    bounds = [F.pad(each, (0, entries - len(each)), value=length) for each in bounds]
    places = torch.rand(count, length, generator=generator)
    device = world.device
    with evaluation_mode(model, looping=config.num_loops > 0):
        model.requires_grad_(True)
        sums = _Sums(model)
        graphs = Graphs(device) if uses_graphs(config, model) else None
        for number in range(world.rank, count, world.size):
            inputs = tuple(x[number].to(device) for x in (sequences, places, bounds))
            if graphs is None:
                sums.add(*inputs)
                continue
            if "sequence" not in graphs:
                graphs.capture("sequence", sums.add, *inputs)
                sums.clear()  # of the calls that made the graph
            graphs.replay("sequence", *inputs)
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
    totals = {name: total / (count * length) for name, total in sums.totals.items()}
    if world.size > 1:
        for _, total in sorted(totals.items()):
            dist.all_reduce(total)
    head = totals.pop(HEAD)
    rows = {name: value.cpu() for name, value in unbank(totals, config.num_layers).items()}
    if "tok_emb.weight" in rows:
        frequency = torch.bincount(tokens.long().cpu(), minlength=config.vocab_size).double() + 0.3
        rows["tok_emb.weight"] = rows["tok_emb.weight"].sum() * frequency / frequency.sum()
    return Sensitivities(rows, head.cpu())


HEAD = "head"


class _Sums:
    """Sums over tokens of a model's squared gradients."""

    def __init__(self, model: GPT) -> None:
        self.model, self.cap = model, model.config.softcap
        self.matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
        self.totals = {name: p.new_zeros(p.shape[:-1], dtype=torch.float64) for name, p in self.matrices.items()}
        self.totals[HEAD] = model.head_weight.new_zeros(model.config.vocab_size, dtype=torch.float64)

    def clear(self) -> None:
        """Begin anew."""
        for total in self.totals.values():
            total.zero_()

    def add(self, ids: Tensor, places: Tensor, bounds: Tensor) -> None:
        """Add one sequence [T], whose segments ``bounds`` cut.

        A label is where ``places`` [T], in [0, 1), falls among the probabilities' sums.
        """
        self.model.zero_grad(set_to_none=True)
        h = self.model.hidden(ids[None], bounds, len(ids))[0]
        # The head takes part through the formula, so its own gradient must stay out of the tied embedding's.
        logits = F.linear(h, self.model.head_weight.detach().to(h.dtype)).float()
        z = softcapped(logits, self.cap)
        with torch.no_grad():
            p = z.softmax(-1)
            labels = (p.cumsum(-1) < places[:, None]).sum(-1).clamp_max(p.size(1) - 1)
            cap = torch.where(z > 0, *self.cap) if isinstance(self.cap, tuple) else self.cap
            slope = 1 - (z / cap).square()
            energy = h.float().square().sum(-1, keepdim=True)
            self.totals[HEAD] += (p * (1 - p) * slope.square() * energy).double().sum(0)
        F.cross_entropy(z, labels, reduction="sum").backward()
        for name, parameter in self.matrices.items():
            if parameter.grad is not None:
                self.totals[name] += parameter.grad.double().square().sum(-1)
