"""The audit: tests, on any scorer, of the conditions that a score must satisfy to be legal.

protocol    what a scorer tells the audit, and the documents that it is given
replay      runs of a scorer on changed documents, and what they may change
checks      the conditions of a scorer, each a function in one table
ledger      writes the record of every score and update
reader      reads that record and checks it; needs the standard library only
ours        this package's stages as scorers
data        the conditions of the data: complete, disjoint, bytes
program     the conditions of the shipped program: sizes, and a run of it on its own
report      the table and the page
run         the audit of a run's folder
"""
