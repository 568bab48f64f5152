"""The embedded documents, which take seconds to find: once a process."""

from __future__ import annotations

from functools import cache

from pgolf.data import corpus

embedded_documents = cache(corpus.embedded_documents)
