"""All kernel benchmarks: ``python -m bench``.

One alone: ``python -m bench.newton_schulz``, ``bench.dequant``, ``bench.smear_gate``. Besides: ``bench.tune`` sweeps
launch parameters, ``bench.plots`` draws the results, ``bench.train_step`` times a training step and
``bench.reference_runs`` makes the runs behind the README's tables.
"""

from __future__ import annotations

import sys

from bench import dequant, newton_schulz, smear_gate
from bench.harness import main

BENCHES = {"newton_schulz": newton_schulz.CASES, "dequant": dequant.CASES, "smear_gate": smear_gate.CASES}

if __name__ == "__main__":
    sys.exit(main(BENCHES, __doc__.partition("\n\n")[2]))
