"""Code that kernel families share; nothing here imports from a family.

backend          the choice between Triton kernels and PyTorch references
compiling        Triton's compiler: `jit`, module constants, compiling many kernels at once
interpreter      Triton's interpreter, mended; the module `compiling` applies it under ``TRITON_INTERPRET=1``
operators        registration of operators with PyTorch
launch           launch parameters by chip
partial_sums     deterministic sums of the programs' partial results
epilogues        elementwise functions that products apply to a tile before they store it
hopper_product   matrix products with an epilogue, for Hopper
"""

import torch

RMS_EPS = torch.finfo(torch.float32).eps  # of every RMSNorm: PyTorch's default for float32
