"""Hand-written Triton kernels, each with a PyTorch reference of the same signature; one folder for each family.

In the order in which a run uses them. Every step of training:

layer_weights         all layers' matrices in the compute dtype, from the banks that the optimizer keeps
smear_gate            embedding lookup, gated addition of the previous token and RMSNorm: the model's prologue
residual              the residual stream between the products: mixes, skips, lanes and RMSNorm
varlen_attention      causal attention within the segments of a packed token stream
gated_attention       an attention sublayer from its normalised input to the input of its output projection
residual_mlp          the MLP with its residual connection, elementwise steps inside the products
linear_cross_entropy  cross-entropy of a softcapped linear head
muon_update           momentum, gradient norm, clipping and the step of the Muon optimizer
newton_schulz         orthogonalisation of the updates of the Muon optimizer

After training:

trellis               integer codes on a trellis by GPTQ, for the artifact
dequant               weights from integer codes, scales and low-rank corrections
low_rank              low-rank adapters of linear layers, one set for each group of rows
adapter_update        one optimizer step of a stack of such adapters

`common` is what families share. `common.backend` chooses between kernels and references.
"""

if __name__ == "kernels":  # found from the root of a checkout; a second copy would register every operator twice
    raise ImportError("import pgolf.kernels, to which this folder belongs; the package `kernels` is another project's")
