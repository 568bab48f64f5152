"""The stage ``quantize``: from trained weights to the artifact and back."""
