"""The n-gram tilt: its hints against a count by dictionaries, its losses against the definition."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import pytest
import torch

from pgolf.config import ConfigError, RunConfig
from pgolf.scoring.ngram import NO_HINT, ngram_hints, tilted


def counted(tokens: list[int], order: int, threshold: float, starts: list[int] | None) -> list[int]:
    """Return the hints, token after token."""
    hints, start = [], 0
    followers: defaultdict[tuple, Counter] = defaultdict(Counter)
    leaders: dict[tuple, int] = {}  # of each context the one that followed most often, the first of several
    for place, token in enumerate(tokens):
        start = place if starts is not None and place in starts else start
        context = start, *tokens[place - order + 1 : place]
        found, leader = followers[context], leaders.get(context, NO_HINT)
        whole = place - start >= order - 1
        hints.append(leader if whole and found and found[leader] >= threshold * found.total() else NO_HINT)
        if whole:
            found[token] += 1
            if context not in leaders or found[token] > found[leader]:
                leaders[context] = token
    return hints


@pytest.mark.parametrize("seed", range(24))
def test_hints_are_those_of_a_count(seed: int, device: torch.device) -> None:
    draw = random.Random(seed)
    size, order = draw.randint(1, 300), draw.randint(2, 5)
    tokens = [draw.randint(0, draw.choice([1, 4])) for _ in range(size)]
    starts = None if seed % 3 == 0 else sorted({0, *draw.choices(range(size), k=4)})
    threshold = draw.choice([0.3, 0.5, 0.8, 1.0])
    places = None if starts is None else torch.tensor(starts)
    found = ngram_hints(torch.tensor(tokens, dtype=torch.int32, device=device), order, threshold, places)
    assert found.dtype == torch.int32 and found.device.type == device.type
    assert found.tolist() == counted(tokens, order, threshold, starts)


@pytest.mark.parametrize("place", [3, 150, 298])
def test_hints_depend_on_earlier_tokens_only(place: int) -> None:
    tokens = torch.randint(3, (300,), generator=torch.Generator().manual_seed(place))
    other = tokens.clone()
    other[place:] = (other[place:] + 1) % 3
    before, after = (ngram_hints(text, 3, 0.6) for text in (tokens, other))
    assert torch.equal(before[: place + 1], after[: place + 1])
    assert (before != NO_HINT).any()


@pytest.mark.parametrize("boost", [0.5, 2.625])
def test_losses_are_those_of_a_distribution(boost: float) -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hints = torch.tensor([2, 5, NO_HINT, 0])
    raised = logits.clone()
    raised[hints != NO_HINT, hints[hints != NO_HINT]] += boost
    nats, expected = -logits.log_softmax(-1), -raised.log_softmax(-1)
    of_hints = nats[torch.arange(4), hints.clamp(min=0)]
    for target in range(7):
        found = tilted(nats[:, target], of_hints, torch.full((4,), target), hints, boost)
        torch.testing.assert_close(found, expected[:, target])


def test_probable_and_improbable_hints_stay_finite() -> None:
    nats, of_hints = torch.tensor([0.0, 90.0]), torch.tensor([0.0, 90.0])
    found = tilted(nats, of_hints, torch.tensor([1, 1]), torch.tensor([1, 1]), 2.625)
    torch.testing.assert_close(found, torch.tensor([0.0, 90.0 - 2.625]))
    assert math.isfinite(float(tilted(nats[1:], of_hints[:1], nats.new_zeros(1), torch.tensor([1]), 2.625)))


def test_counting_what_is_scored_later_is_refused() -> None:
    with pytest.raises(ConfigError, match="set these or ngram_tilt_scope=document"):
        RunConfig(ngram_tilt_boost=1.0, ngram_tilt_scope="stream", ttt_order="stream")
