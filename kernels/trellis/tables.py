"""Trellises by number of states: Ungerboeck's codes for one dimension, in systematic feedback form."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

# Parity-check polynomials (h0, h1) by number of states; Ungerboeck 1982, table I.
POLYNOMIALS = {
    4: (0o5, 0o2),
    8: (0o13, 0o04),
    16: (0o23, 0o04),
    32: (0o45, 0o10),
    64: (0o103, 0o024),
    128: (0o235, 0o126),
}
STATES = (1, *POLYNOMIALS)


class Trellis(NamedTuple):
    """A trellis: each state's parity of codes, and its next states by the bit ((code - parity) / 2) modulo 2."""

    parity: tuple[int, ...]
    following: tuple[tuple[int, int], ...]


@cache
def trellis(states: int) -> Trellis:
    """Return the trellis of ``states`` states, one of `STATES`. With one state codes of both parities are allowed."""
    if states == 1:
        return Trellis((0,), ((0, 0),))
    length = states.bit_length() - 1
    h0, h1 = POLYNOMIALS[states]
    following = []
    for state in range(states):
        output, after = state & 1, []
        for bit in (0, 1):
            moved = state >> 1
            for place in range(length):
                moved ^= ((h0 >> place + 1 & output) ^ (h1 >> place + 1 & bit)) << place if output or bit else 0
            after.append(moved)
        following.append((after[0], after[1]))
    return Trellis(tuple(state & 1 for state in range(states)), tuple(following))


def predecessors(states: int) -> list[tuple[int, int, int, int]]:
    """Return, for every state, its two predecessors with their codes modulo 4: (state, code, state, code)."""
    found: list[list[int]] = [[] for _ in range(states)]
    parity, following = trellis(states)
    for state in range(states):
        for bit in (0, 1):
            found[following[state][bit]] += [state, parity[state] + 2 * bit]
    return [(a, b, c, d) for a, b, c, d in found]
