"""The actions of ``pgolf data`` that create data: download shards, build them from documents, train a tokenizer.

The exported program lacks this module, because it trains on existing data.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from pgolf.common.progress import progress

AFTER_SPACE, BEFORE_SPACE = "after-space", "before-space"  # where the operators are; the first is published


def add_actions(actions: Any) -> None:
    """Add ``fineweb``, ``build`` and ``tokenizer`` to the subparsers of ``pgolf data``."""
    fineweb = actions.add_parser("fineweb", help="download the published FineWeb shards and tokenizer")
    fineweb.add_argument("--variant", default="sp8192", help="sp8192 (the default), or sp8192_caseops: case-coded")
    fineweb.add_argument("--train-shards", type=int, default=80, help="training shards of 100M tokens (default: 80)")
    fineweb.add_argument("--revision", help="commit of the repository (default: the one begun with, else the newest)")
    fineweb.add_argument("--out", type=Path, default=Path("data"), help="data folder (default: data)")
    fineweb.set_defaults(action=_fineweb)

    build = actions.add_parser("build", help="make shards of documents (.jsonl, .jsonl.xz, .jsonl.zst)")
    build.add_argument("--docs", type=Path, required=True, help='documents, one {"text": …} a line')
    build.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model")
    build.add_argument("--out", type=Path, required=True, help="data folder to make")
    split = build.add_mutually_exclusive_group(required=True)
    split.add_argument("--val-docs", type=int, default=0, help="the first so many documents are for validation")
    split.add_argument("--val-file", type=Path, help="documents for validation, in a file of their own")
    add_case(build, "case-code the documents (CaseOps); count bytes in sidecars")
    build.add_argument("--workers", type=int, help="threads (default: all cores)")
    build.set_defaults(action=_build)

    tokenizer = actions.add_parser("tokenizer", help="train a tokenizer with the challenge's settings")
    tokenizer.add_argument("--docs", type=Path, required=True, help='documents, one {"text": …} a line')
    tokenizer.add_argument("--vocab-size", type=int, default=8192, help="tokens (default: 8192)")
    tokenizer.add_argument("--out", type=Path, required=True, help="file of the model to write")
    tokenizer.add_argument("--max-docs", type=int, help="use only the first so many documents")
    add_case(tokenizer, "train on case-coded documents (CaseOps)")
    tokenizer.set_defaults(action=_tokenizer)


def add_case(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the option --case, which takes the place of the operators."""
    help += f": operators {AFTER_SPACE} (the default, as published) or {BEFORE_SPACE} of their word"
    parser.add_argument("--case", nargs="?", const=AFTER_SPACE, choices=(AFTER_SPACE, BEFORE_SPACE), help=help)


def _fineweb(arguments: argparse.Namespace) -> int:
    from pgolf.data.fineweb import download

    entry = download(
        arguments.out, arguments.variant, arguments.train_shards, revision=arguments.revision, progress=progress
    )
    print(json.dumps(entry, indent=1))
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from pgolf.data.dataset import build_dataset

    entry = build_dataset(
        arguments.docs,
        arguments.tokenizer,
        arguments.out,
        val_docs=arguments.val_docs,
        val_documents=arguments.val_file,
        workers=arguments.workers,
        case_coding=arguments.case is not None,
        before_space=arguments.case == BEFORE_SPACE,
        progress=progress,
    )
    for name, split in entry["splits"].items():
        print(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes")
    both = entry["disjoint"]
    print(
        f"documents in both splits: {both['documents_in_both_splits']} "
        f"({both['train_documents_left_out']} training documents left out for it)"
    )
    return 0


def _tokenizer(arguments: argparse.Namespace) -> int:
    from pgolf.data.corpus import read_documents
    from pgolf.data.tokenizer import train_tokenizer

    documents = islice(read_documents(arguments.docs), arguments.max_docs)
    coding = dict(case_coding=arguments.case is not None, before_space=arguments.case == BEFORE_SPACE)
    train_tokenizer(documents, arguments.vocab_size, arguments.out, **coding)
    print(f"{arguments.out}: {arguments.vocab_size} tokens")
    return 0
