"""Score-first test-time training: a document is scored chunk by chunk, and learned from only after it is scored.

Each document has its own adapters, which are updated on a chunk after its loss is recorded. After fixed numbers of
documents a phase ends: the base weights are trained on documents that are completely scored, and later documents are
scored with the result.

    plan        batches, lanes and phases, from document lengths and settings alone
    ledger      checks that scoring comes first
    adapters    the low-rank adapters of a batch of documents, and their optimizer
    inputs      the model's inputs in one step
    scorer      scoring and learning from one chunk of each document of a batch
    base        the training of the base weights
    engine      the run through the plan, and its result
"""
