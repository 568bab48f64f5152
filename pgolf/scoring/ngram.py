"""The n-gram tilt: more probability for the token that has followed the same few tokens before.

The context of a target x_t is the order - 1 tokens before it. Its hint h_t is the token that has followed this context
most often so far, if it did so at least in the share ``threshold`` of the context's occurrences. With the model's p

    p'_t(a) = p_t(a) exp(β [a = h_t]) / Z_t,   Z_t = 1 + p_t(h_t) (exp(β) - 1),

so p' is a distribution again, and the loss is that of p less β [x_t = h_t] plus log Z_t. Targets without a hint keep
their loss. Hints use only tokens before their target: those of its document, or those of the whole stream, which
requires that documents are scored one by one in the stream's order. Source: the token expert of parameter-golf #1514
and #2135, whose scope is the stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NO_HINT = -1
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407  # of Knuth's 64-bit generator


@torch.no_grad()
def ngram_hints(tokens: Tensor, order: int, threshold: float, document_starts: Tensor | None = None) -> Tensor:
    """Return each place's hint, int32 [N], NO_HINT where there is none.

    Among tokens that followed equally often, the hint is the first to reach that count. Contexts are compared by 64-bit
    hashes. The cost is two sorts of N places.

    Args:
        tokens: [N] of any integer dtype.
        order: of the n-gram, context and target together, at least 2.
        threshold: the least share of a context's occurrences that its hint must have followed.
        document_starts: ascending places of the documents' first tokens; n-grams are counted in each document. None:
            in the whole stream.
    """
    tokens = tokens.long()
    places = torch.arange(tokens.numel(), device=tokens.device)
    start = torch.zeros_like(places)
    if document_starts is not None:
        document_starts = document_starts.to(places)
        start[document_starts] = document_starts
        start = start.cummax(0).values
    context = start
    for before in range(1, order):
        context = (context ^ context >> 29) * _MULTIPLIER + (tokens.roll(before) + 1) * _INCREMENT
    # An incomplete context gets a key of its own, so that it never occurs twice.
    whole = places - start >= order - 1
    context = torch.where(whole, context, places)

    by_context = context.sort(stable=True).indices  # equal contexts side by side, in the stream's order
    first, group = _groups(context[by_context])
    earlier = places - first
    followers = tokens[by_context]
    # How often the follower has followed its context, this time included: its rank among equal followers of a group.
    pairs = (group * (int(tokens.max()) + 1) + followers).sort(stable=True)
    times = torch.empty_like(places)
    times[pairs.indices] = places - _groups(pairs.values)[0] + 1
    most = (group << 32 | times).cummax(0).values  # the running maximum within each group: groups ascend
    leads = torch.ones_like(whole)
    leads[1:] = most[1:] > most[:-1]
    leader = torch.where(leads, places, 0).cummax(0).values

    hints = torch.full_like(tokens, NO_HINT, dtype=torch.int32)
    asked = (earlier > 0).nonzero()[:, 0]
    count = most[asked - 1] & 0xFFFFFFFF
    sure = asked[count >= threshold * earlier[asked].double()]
    hints[by_context[sure]] = followers[leader[sure - 1]].int()
    return hints


def _groups(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each of the sorted keys, the first place and the number of its run of equal keys."""
    places, new = torch.arange(keys.numel(), device=keys.device), torch.ones_like(keys, dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    return torch.where(new, places, 0).cummax(0).values, new.cumsum(0) - 1


def tilted(nats: Tensor, hint_nats: Tensor, targets: Tensor, hints: Tensor, boost: float) -> Tensor:
    """Return the losses of the tilted distributions, in nats.

    Args:
        nats: losses of ``targets`` by the model.
        hint_nats: losses of ``hints`` as targets by the model; any number where there is no hint.
        boost: β.
    """
    normaliser = torch.log1p((-hint_nats).exp() * math.expm1(boost))
    return torch.where(hints == NO_HINT, nats, nats + normaliser - boost * (targets == hints))
