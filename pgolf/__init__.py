"""pgolf: train, quantise and score the best language model that fits in 16,000,000 bytes."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # source checkout: kernels/ lies beside pgolf/
    _spec = ModuleSpec("pgolf.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_here.parent / "kernels")]
    kernels = sys.modules["pgolf.kernels"] = module_from_spec(_spec)
