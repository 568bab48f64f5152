"""Subtract from each code of an embedding its linear prediction from the earlier columns of the row.

    e_j = u_j - p_j,   p_j = Σ_{i<j} L_ji e_i,   residual_j = u_j - round(p_j)

L is not stored: it is computed from the rows above. Their second moments S, with a ridge added, are L D Lᵀ, with ones
on L's diagonal. The first rows are their own residuals. Each later block has as many rows as are above it, or what is
left of the matrix, and one L.

All numbers are integers, in int64 or in float64 below 2^53, whose sums are the same in any order. So all machines
restore the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

FIRST_ROWS = 2  # rows that are not predicted, as a multiple of the columns
MOST_COLUMNS = 1024  # with more, int64 could overflow
RIDGE = 2  # times columns / rows: the ridge, as a multiple of the mean of S's diagonal
FACTOR_BITS, ERROR_BITS = 14, 8  # fractional bits of L and of e
LARGEST_FACTOR = 1 << 3 + FACTOR_BITS
LARGEST_PREDICTION = 1 << 14
PANEL = 32  # columns whose products with all earlier columns are computed at once


def has_enough_rows(rows: int, columns: int) -> bool:
    """Return whether a matrix of codes has enough rows to estimate its columns' moments, as an embedding has."""
    return columns <= MOST_COLUMNS and rows >= 4 * FIRST_ROWS * columns


def decorrelate(codes: np.ndarray) -> np.ndarray:
    """Return the residuals, int16 [R, C], of int8 codes [R, C] with `has_enough_rows`."""
    residuals = codes.astype(np.int16)
    for part in _parts(*codes.shape):
        lines = codes[part].T.astype(np.float64)
        for line, prediction in _predictions(codes[: part.start], lines, given_codes=True):
            line -= prediction
        residuals[part] = lines.T
    return residuals


def restore(residuals: np.ndarray) -> np.ndarray:
    """Return the codes, int8 [R, C], whose `decorrelate` gives these residuals. Raises ValueError if none do."""
    codes = residuals.astype(np.int16)
    for part in _parts(*codes.shape):
        lines = residuals[part].T.astype(np.float64)
        for line, prediction in _predictions(codes[: part.start], lines, given_codes=False):
            line += prediction
        codes[part] = np.clip(lines.T, -256, 255)
    if codes.min() < -128 or codes.max() > 127:
        raise ValueError("these are no residuals of codes of 8 bits")
    return codes.astype(np.int8)


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Yield the blocks of rows that share one L; each has as many rows as are above it."""
    start = FIRST_ROWS * columns
    while start < rows:
        yield slice(start, min(2 * start, rows))
        start *= 2


def _predictions(above: np.ndarray, lines: np.ndarray, *, given_codes: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each of ``lines`` [C, n] with its round(p).

    Lines hold codes if ``given_codes``, else residuals; the caller converts each line in place before it asks for more.
    """
    factor, errors = _factor(above), np.empty_like(lines)
    for start in range(0, len(lines), PANEL):
        panel = factor[start : start + PANEL, :start] @ errors[:start]
        for j, p in enumerate(panel, start):
            p += factor[j, start:j] @ errors[start:j]  # with the fractional bits of both
            prediction = np.floor(p / (1 << FACTOR_BITS + ERROR_BITS) + 0.5)
            prediction = np.clip(prediction, -LARGEST_PREDICTION, LARGEST_PREDICTION)  # residuals are int16
            code = lines[j] if given_codes else lines[j] + prediction
            errors[j] = code * (1 << ERROR_BITS) - np.floor(p / (1 << FACTOR_BITS))
            yield lines[j], prediction


def _factor(above: np.ndarray) -> np.ndarray:
    """Return 2^FACTOR_BITS L for the rows [R, C] above: integers in float64 [C, C], with zeros on the diagonal."""
    rows, columns = above.shape
    exact = above.astype(np.float64)
    moments = (exact.T @ exact).astype(np.int64)
    mean = 1 << min(22, 31 - (columns - 1).bit_length())  # of the scaled diagonal, so that all moments are below 2^31
    moments = moments * mean // max(int(moments.trace()) // columns, 1)
    moments += np.diag(np.full(columns, max(RIDGE * columns * mean // rows, 1)))
    factor = np.zeros((columns, columns))
    for k in range(columns - 1):
        pivot, rest = max(int(moments[k, k]), 1), moments[k, k + 1 :]
        factor[k + 1 :, k] = np.clip((rest << FACTOR_BITS) // pivot, -LARGEST_FACTOR, LARGEST_FACTOR)
        moments[k + 1 :, k + 1 :] -= rest[:, None] * rest // pivot
    return factor
