"""Hand-written Triton kernels, each with a PyTorch reference of the same signature; one folder for each family.

In the order in which a run uses them. Every step of training:

layer_weights         all layers' matrices in the compute dtype, from the banks that the optimizer keeps
smear_gate            embedding lookup, gated addition of the previous token and RMSNorm: the model's prologue
residual              the residual stream between the products: mixes, skips, lanes and RMSNorm
varlen_attention      attention within the segments of a packed token stream, causal, windowed or full
gated_attention       an attention sublayer from its normalised input to the input of its output projection
residual_mlp          the MLP with its residual connection, elementwise steps inside the products
linear_cross_entropy  cross-entropy of a linear head, softcapped or not
muon_update           momentum, gradient norm, clipping and the step of the Muon optimizer
newton_schulz         orthogonalisation of the updates of the Muon optimizer

After training:

trellis               integer codes on a trellis by GPTQ, for the artifact
dequant               weights from integer codes, scales and low-rank corrections
low_rank              low-rank adapters of linear layers, one set for each group of rows
adapter_update        one optimizer step of a stack of such adapters

`common` is what families share.

An operation can be imported from its family: ``from pgolf.kernels.residual_mlp import residual_mlp``. Operations that
are not named as a family can be imported from here too: ``from pgolf.kernels import newton_schulz_banks``. So can the
classes of their arguments, and `set_backend` and `using`, which choose between kernels and references. The name of a
family is always its module. PyTorch and Triton are imported when the first name is.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "kernels":  # found from the root of a checkout; a second copy would register every operator twice
    raise ImportError("import pgolf.kernels, to which this folder belongs; the package `kernels` is another project's")

if TYPE_CHECKING:
    from .adapter_update import adapter_update_ as adapter_update_
    from .common.backend import set_backend as set_backend
    from .common.backend import using as using
    from .dequant import DequantizePlan as DequantizePlan
    from .dequant import LowRankFactors as LowRankFactors
    from .dequant import QuantizedMatrix as QuantizedMatrix
    from .dequant import dequantize as dequantize
    from .dequant import dequantize_all as dequantize_all
    from .dequant import pack as pack
    from .dequant import unpack as unpack
    from .gated_attention import KVCache as KVCache
    from .gated_attention import cached_gated_attention as cached_gated_attention
    from .muon_update import apply_update as apply_update
    from .muon_update import clip_factor as clip_factor
    from .muon_update import momentum_update as momentum_update
    from .muon_update import squared_norm as squared_norm
    from .newton_schulz import newton_schulz_banks as newton_schulz_banks
    from .residual import enter_lanes_norm as enter_lanes_norm
    from .residual import join_skip as join_skip
    from .residual import mix_lanes as mix_lanes
    from .residual import mix_lanes_final as mix_lanes_final
    from .residual import mix_lanes_norm as mix_lanes_norm
    from .residual import residual_linear as residual_linear
    from .residual import residual_linear_norm as residual_linear_norm
    from .residual import residual_mix_norm as residual_mix_norm
    from .residual import scaled_rms_norm as scaled_rms_norm
    from .smear_gate import embed_smear_norm as embed_smear_norm
    from .trellis import trellis_gptq as trellis_gptq

_NAMES = {
    "common.backend": "set_backend using",
    "adapter_update": "adapter_update_",
    "dequant": "DequantizePlan LowRankFactors QuantizedMatrix dequantize dequantize_all pack unpack",
    "gated_attention": "KVCache cached_gated_attention",
    "muon_update": "apply_update clip_factor momentum_update squared_norm",
    "newton_schulz": "newton_schulz_banks",
    "residual": "enter_lanes_norm join_skip mix_lanes mix_lanes_final mix_lanes_norm "
    "residual_linear residual_linear_norm residual_mix_norm scaled_rms_norm",
    "smear_gate": "embed_smear_norm",
    "trellis": "trellis_gptq",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOMES)

if not TYPE_CHECKING:  # to a type checker, names that are not imported above are errors

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            family = (Path(__file__).parent / name / "__init__.py").is_file()
            advice = f"; it is a family: from {__name__}.{name} import {name}" if family else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice}")
        globals()[name] = value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
