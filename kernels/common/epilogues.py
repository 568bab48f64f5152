"""What products do with a tile before they write it, shared by kernels for Hopper and for all chips."""

from __future__ import annotations

from .compiling import constexpr, jit, tl

# hidden is cut to the even bf16 below, to the odd one next to it for a negative pre: too small by one unit in the last
# place for a positive pre, 0.56 % on average, by which those are made larger before.
EVENED = constexpr(1.0028136)
SQUARE, MARKED_SQUARE, GRADIENT = (constexpr(k) for k in range(3))  # epilogues; the last reads a matrix


@jit
def _square(pre, MARK: tl.constexpr, dtype: tl.constexpr):
    """leaky_relu(pre, 0.5)² in dtype, with MARK the sign of pre in its last bit."""
    if MARK and dtype == tl.bfloat16:
        root = tl.maximum(pre * EVENED, pre * 0.5)
        bits, sign = (root * root).to(tl.int32, bitcast=True), pre.to(tl.int32, bitcast=True) >> 15
        hidden = (((bits & ~0x1FFFF) | (sign & 0x1FFFF)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        root = tl.maximum(pre, pre * 0.5)
        hidden = (root * root).to(dtype)
        if MARK:
            bits = hidden.to(tl.int16, bitcast=True)
            hidden = ((bits & -2) | (pre < 0).to(tl.int16)).to(dtype, bitcast=True)
    return hidden


@jit
def _slope(hidden):
    """The derivative of leaky_relu(pre, 0.5)² by pre, from hidden as `_square` marks it."""
    negative = hidden.to(tl.int16, bitcast=True) & 1
    root = tl.sqrt(hidden.to(tl.float32))
    return tl.where(negative != 0, -root, 2 * root)


@jit
def finish(product, other, EPILOGUE: tl.constexpr, dtype: tl.constexpr):
    """What an epilogue makes of a product, and of the elements of another matrix there, in dtype."""
    if EPILOGUE < GRADIENT:
        result = _square(product, EPILOGUE == MARKED_SQUARE, dtype)
    else:
        result = (product * _slope(other)).to(dtype)
    return result


@jit
def away_from_zero(gain):
    """A gain in fp32, at least ±2⁻²⁴: then q^ has the direction of q, and logits are zero in fp32 all the same."""
    gain = gain.to(tl.float32)
    return tl.where(tl.abs(gain) < 2**-24, tl.where(gain < 0, -(2**-24), 2**-24), gain)
