"""pgolf: train, quantise and score the best language model that fits in 16,000,000 bytes."""

__version__ = "0.1.0"
