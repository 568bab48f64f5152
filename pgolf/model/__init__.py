"""The model: its formulas, its weights and the CUDA graphs that replay it."""
