"""Score-first test-time training: documents are scored chunk by chunk, and learned from only after they are scored.

Every document has its own adapters, updated on a chunk once its loss is recorded. After fixed numbers of documents the
base weights are trained on documents that are scored as a whole (a phase ends); later ones are scored with the result.

    plan        who scores what, and when each phase ends: from document lengths and settings alone
    ledger      the proof that scoring comes first
    adapters    the low-rank adapters of a batch of documents, and their optimizer
    inputs      what the model reads in one step
    scorer      the device's work on a chunk of every document of a batch, replayed from CUDA graphs where it is small
    base        the training of the base weights
    engine      the run through the plan, and its result
"""
