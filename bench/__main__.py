"""All kernel benchmarks: ``python -m bench``.

One family alone: ``python -m bench.newton_schulz``, and so on by the names in BENCHES. Besides: ``bench.tune`` sweeps
launch parameters, ``bench.plots`` draws the results, ``bench.train_step`` times a training step, ``bench.score``
compares presets, ``bench.quantization`` ways to quantise, ``bench.reference_runs`` makes whole runs and
``bench.results_page`` writes ``docs/results.md``.
"""

from __future__ import annotations

import sys

from bench import (
    adapter_update,
    dequant,
    gated_attention,
    layer_weights,
    linear_cross_entropy,
    low_rank,
    muon_update,
    newton_schulz,
    optimizer_step,
    residual,
    residual_mlp,
    smear_gate,
    trellis,
    varlen_attention,
)
from bench.harness import main

FAMILIES = (
    newton_schulz,
    dequant,
    smear_gate,
    residual,
    layer_weights,
    varlen_attention,
    gated_attention,
    residual_mlp,
    linear_cross_entropy,
    low_rank,
    muon_update,
    adapter_update,
    trellis,
    optimizer_step,
)
BENCHES = {family.__name__.removeprefix("bench."): family.CASES for family in FAMILIES}

if __name__ == "__main__":
    sys.exit(main(BENCHES, __doc__.partition("\n\n")[2]))
