"""The n-gram tilt: more probability for the token that has followed the same few tokens before.

A hint h_t is the token that has followed the context of the target x_t, the order - 1 tokens before it, most often so
far, where that is a share of at least the threshold of the times the context came. With p of the model

    p'_t(a) = p_t(a) exp(β [a = h_t]) / Z_t,   Z_t = 1 + p_t(h_t) (exp(β) - 1),

so p' is a distribution again, and the loss is that of p less β [x_t = h_t] plus log Z_t. Targets without a hint keep
their loss. Hints are made of tokens before their target only: of its document, or of the whole stream, where every
document is scored after those before it. Source: the token expert of parameter-golf #1514 and #2135, whose scope is the
stream.
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

    Of several tokens that followed equally often the first to have done so is taken. Contexts are told apart by 64-bit
    hashes. Sorts the N places twice.

    Args:
        tokens: [N] of any integer dtype.
        order: of the n-gram, context and target together, at least 2.
        threshold: the least share of the times.
        document_starts: ascending places of the documents' first tokens: each counts on its own. None: one count.
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
    # Whole contexts only: the others are each their own, so that none comes twice.
    whole = places - start >= order - 1
    context = torch.where(whole, context, places)

    by_context = context.sort(stable=True).indices  # in a group of equal contexts by place
    first, group = _groups(context[by_context])
    earlier = places - first
    followers = tokens[by_context]
    # How often the follower has followed, this time included: its rank among the group's equal followers.
    pairs = (group * (int(tokens.max()) + 1) + followers).sort(stable=True)
    times = torch.empty_like(places)
    times[pairs.indices] = places - _groups(pairs.values)[0] + 1
    most = (group << 32 | times).cummax(0).values  # within the group, which rises
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
    """Return the first place and the number of each sorted key's run of equal ones."""
    places, new = torch.arange(keys.numel(), device=keys.device), torch.ones_like(keys, dtype=torch.bool)
    new[1:] = keys[1:] != keys[:-1]
    return torch.where(new, places, 0).cummax(0).values, new.cumsum(0) - 1


def tilted(nats: Tensor, hint_nats: Tensor, targets: Tensor, hints: Tensor, boost: float) -> Tensor:
    """Return the losses of the tilted distributions, in nats.

    Args:
        nats: losses of ``targets`` by the model.
        hint_nats: its losses were ``hints`` the targets; any where there is no hint.
        boost: β.
    """
    normaliser = torch.log1p((-hint_nats).exp() * math.expm1(boost))
    return torch.where(hints == NO_HINT, nats, nats + normaliser - boost * (targets == hints))
