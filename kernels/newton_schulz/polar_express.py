"""Coefficients of Newton-Schulz, a tuple (a, b, c) for each step: Jordan's fixed tuple, and Polar Express.

Polar Express (Amsel et al., arXiv 2505.16932) composes, step by step, the odd quintics that bring the interval of
singular values closest to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Real

import numpy as np

Coefficients = tuple[tuple[float, float, float], ...]
AnyCoefficients = Sequence[float] | Sequence[Sequence[float]]  # (a, b, c) for all steps, or a tuple for each

QUINTIC: tuple[float, float, float] = (3.4445, -4.775, 2.0315)  # Jordan's fixed tuple (Muon, 2024)


def _optimal_quintic(low: float, high: float) -> np.ndarray:
    """Return the odd quintic (a, b, c) that minimises max |1 - p(σ)| on [low, high], by Remez exchange in float64."""
    if low / high > 1 - 5e-6:  # the exchange would divide 0 by 0; its limit is the Padé approximant
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = np.inf, 0.0
    while abs(error - previous) > 1e-15:
        previous = error
        points = np.array([low, inner, outer, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner, outer = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
        inner, outer = min(inner, outer), max(inner, outer)
    return np.array([a, b, c])


@lru_cache
def polar_express_coefficients(
    steps: int = 5, lower: float = 1e-3, safety: float = 0.02, cushion: float = 0.02
) -> Coefficients:
    """Return the Polar Express tuples (a, b, c), one for each step.

    ``lower`` bounds the singular values from below. ``safety`` shrinks the argument of every polynomial but the last
    by 1 + safety, so that rounding cannot push a value out of the interval. ``cushion`` bounds the ratio of the
    interval's ends from below for the same reason. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    low, high, tuples = lower, 1.0, []
    powers = np.array([1, 3, 5])
    for step in range(steps):
        abc = _optimal_quintic(max(low, cushion * high), high)
        if cushion * high > low:  # the image of [low, high] is not centred at 1: rescale so that it is
            abc = abc * 2 / (abc @ low**powers + abc @ high**powers)
        if step < steps - 1:
            abc = abc / (1 + safety) ** powers
        a, b, c = (float(value) for value in abc)
        tuples.append((a, b, c))
        low = float(abc @ low**powers)
        high = 2 - low
    return tuple(tuples)


POLAR_EXPRESS: Coefficients = polar_express_coefficients(5)


def coefficients_by_step(coefficients: AnyCoefficients, steps: int) -> Coefficients:
    """Return one tuple for each step.

    A single tuple, flat (a, b, c) or in a sequence of its own, serves for all steps. POLAR_EXPRESS is generated for
    ``steps``. Another number of tuples than steps is refused, since packages disagree: some cut a list to the steps,
    others take as many steps as the list has tuples.

    Raises ValueError for steps < 1, a tuple of another length than 3, and a wrong number of tuples.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    rows: Sequence = (coefficients,) if all(isinstance(value, Real) for value in coefficients) else coefficients
    if not all(len(row) == 3 for row in rows):
        raise ValueError(f"coefficients must be (a, b, c), or such a tuple for each step, got {coefficients}")
    tuples = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    if len(tuples) == steps:
        return tuples
    if tuples == POLAR_EXPRESS:
        return polar_express_coefficients(steps)
    if len(tuples) != 1:
        others = f"coefficients[:{steps}]" if len(tuples) > steps else "a single tuple for all steps"
        raise ValueError(f"coefficients: {len(tuples)} tuples for {steps} steps; pass steps={len(tuples)}, or {others}")
    return tuples * steps
