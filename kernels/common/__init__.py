"""What kernel families share; nothing here imports from a family.

backend          the choice between Triton kernels and PyTorch references
compiling        Triton's compiler: `jit`, constants, many kernels at once
operators        registration with PyTorch
launch           launch parameters by chip
partial_sums     sums of what many programs have left, in a fixed order
epilogues        what products do with their tiles before they write them
hopper_product   products with an epilogue, for Hopper
"""

import torch

RMS_EPS = torch.finfo(torch.float32).eps  # of every RMSNorm, as torch has it for float32
