"""Elementwise functions that products apply to a tile before they store it, shared by kernels for all chips."""

from __future__ import annotations

from .compiling import constexpr, jit, tl

# Marking truncates hidden to an even bf16 for a positive pre: 0.56 % too small on average. Multiplying the root by this
# factor first removes the bias.
EVENED = constexpr(1.0028136)
SQUARE, MARKED_SQUARE, GRADIENT = (constexpr(k) for k in range(3))  # epilogues; GRADIENT reads a second matrix


@jit
def _leaky_relu(pre, positive, SLOPE: tl.constexpr):
    """leaky_relu(pre, SLOPE), and positive where pre is not negative."""
    # With slope 0 the maximum would lose a NaN, and 0 times infinity be one.
    return tl.where(pre < 0, 0.0, positive) if SLOPE == 0 else tl.maximum(positive, pre * SLOPE)


@jit
def _square(pre, MARK: tl.constexpr, SLOPE: tl.constexpr, dtype: tl.constexpr):
    """leaky_relu(pre, SLOPE)² in dtype; MARK stores the sign of pre in the last mantissa bit."""
    if MARK and dtype == tl.bfloat16:
        root = _leaky_relu(pre, pre * EVENED, SLOPE)
        bits, sign = (root * root).to(tl.int32, bitcast=True), pre.to(tl.int32, bitcast=True) >> 15
        hidden = (((bits & ~0x1FFFF) | (sign & 0x1FFFF)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        root = _leaky_relu(pre, pre, SLOPE)
        hidden = (root * root).to(dtype)
        if MARK:
            bits = hidden.to(tl.int16, bitcast=True)
            hidden = ((bits & -2) | (pre < 0).to(tl.int16)).to(dtype, bitcast=True)
    return hidden


@jit
def _derivative(hidden, SLOPE: tl.constexpr):
    """The derivative of leaky_relu(pre, SLOPE)² with respect to pre, from hidden as marked by `_square`.

    With SLOPE 0 hidden needs no mark: it is zero where pre is negative.
    """
    negative = hidden.to(tl.int16, bitcast=True) & 1
    root = tl.sqrt(hidden.to(tl.float32))
    return 2 * root if SLOPE == 0 else tl.where(negative != 0, -(2 * SLOPE * root), 2 * root)


@jit
def finish(product, hidden, EPILOGUE: tl.constexpr, SLOPE: tl.constexpr, dtype: tl.constexpr):
    """Apply an epilogue to a tile of a product, for GRADIENT with the same tile of a second matrix; result in dtype."""
    if EPILOGUE < GRADIENT:
        result = _square(product, EPILOGUE == MARKED_SQUARE, SLOPE, dtype)
    else:
        result = (product * _derivative(hidden, SLOPE)).to(dtype)
    return result


@jit
def away_from_zero(gain):
    """Return a gain in fp32, clamped to magnitude 2⁻²⁴ or more.

    q^ then keeps the direction of q, from which backward divides the gain out; logits still round to zero in fp32.
    """
    gain = gain.to(tl.float32)
    return tl.where(tl.abs(gain) < 2**-24, tl.where(gain < 0, -(2**-24), 2**-24), gain)
