"""The first code of the exported program: unpack the sources, then call the command line.

This module, shortened, is the program's ``__main__``; `pgolf.submission.export` says what its file is made of.
The sources have been packed by a context-mixing compressor of the PAQ family (Mahoney 2005), which makes of Python a
quarter less than brotli does; `pgolf.submission.squeeze` is the other half of it.

A character is a path through a tree, from the root by yes or no to its leaf. For every such decision there are eight
contexts: the last characters, the word that is being written, what stands before it, the line's first mark, and so on.
Each remembers, in a hash table, how often it has been yes. Their opinions, as log odds, are weighted, added up and made
a probability; then the weights move towards those that were right. All of these numbers are whole, so that any machine
computes the same ones. It takes some ten seconds, once: the sources are kept in a folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import math
import os
import sys
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from zlib import crc32

# The exporter writes here: length and digest of the sources, modules that are not among them, the module to call.
LENGTH, DIGEST, ABSENT, ENTRY = 0, "", "", ""

# Characters that look alike to a program stand side by side, so that the first decisions are about their kind. Below
# each the depth of its leaf (hexadecimal), which falls with its frequency in Python sources.
ALPHABET = b"aeiouyhlrnmstdcgpbfkvwxqjz_ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 '\".([{,)]}:\n=+-*/%<>!&|^~@\\;#?$`\0"
DEPTHS = "444567755455456666577889985899899aa9aa9998aa988aaabcc8899aaaccb477657766677669989aaabccddcbdeeddb"
CONTEXTS = 8
MASK = (1 << 20) - 1  # of a place in a context's table; an entry is its key xor the state
# A state is a probability (12 bits), how often it has been updated (up to 3), and whether always by the same bit.
NEW = 2048 << 3 | 1


def leaves() -> dict[int, int]:
    """Characters by the number of their leaf; the root is 1, and node n has the children 2 n and 2 n + 1."""
    found, node = {}, 1
    for character, depth in zip(ALPHABET, DEPTHS, strict=True):
        while node >> int(depth, 16) == 0:
            node *= 2
        found[node] = character
        node += 1
        while node & 1 == 0:
            node >>= 1
    return found


def state_tables() -> tuple[list[int], tuple[list[int], list[int]]]:
    """Log odds (times 256) by state, and the next state by bit and state."""
    odds, following = [], ([], [])
    for state in range(1 << 15):
        probability, updates, steady = state >> 3, state >> 1 & 3, state & 1
        odds.append(round(256 * math.log((probability + 0.5) / (4095.5 - probability))) if updates else 0)
        for bit in (0, 1):
            moved = round(probability + (4095 * bit - probability) / (updates + 1.3))
            same = steady and (not updates or (probability > 2047) == bit)
            following[bit].append(min(max(moved, 20), 4075) << 3 | min(updates + 1, 3) << 1 | same)
    return odds, following


def predictions(text: bytearray) -> Iterator[int]:
    """Yield the probability, in 65,536ths, that the next decision is yes, and be sent what it was.

    The characters go into ``text`` as they become known, the first one after its last decision was sent.
    """
    characters, (odds, following) = leaves(), state_tables()
    likely = [round(65536 / (1 + math.exp(-x / 256))) for x in range(-2048, 2048)]
    tables = [array("I", bytes(MASK * 4 + 4)) for _ in range(CONTEXTS)]
    starts = range(0, 8 * CONTEXTS, 8)
    by_node, by_character = (defaultdict(lambda: [9000] * 8 * CONTEXTS) for _ in range(2))
    quote = word = name = token = first = character = b""
    before_brackets = [b""]
    while True:
        last, pair = (quote + text[-n:] for n in (1, 2))
        contexts = (
            last,
            pair,
            text[-3:],
            text[-5:],
            text[-10:],
            word,
            b" ".join((first, token, quote)),
            b" ".join((word, token, first, before_brackets[-1])),
        )
        hashes = [crc32(context) for context in contexts]
        second_weights, node = by_character[character], 1
        while node not in characters:
            mark, first_weights = node * 0x9E3779B1 & 0xFFFFFFFF, by_node[node]
            total, known, slots = 0, [], []
            for table, key, start in zip(tables, hashes, starts, strict=True):
                key ^= mark
                state = table[key & MASK] ^ key
                if state < 32768:
                    x = odds[state]
                    place = start + (state & 7)
                    total += (first_weights[place] + second_weights[place]) * x
                    known.append((place, x))
                    slots.append((table, key, state))
                else:
                    slots.append((table, key, NEW))
            probability = likely[min(max(total >> 16, -2047), 2047) + 2048]
            bit = yield probability
            update = following[bit]
            for table, key, state in slots:
                table[key & MASK] = key ^ update[state]
            error = (bit << 16) - probability
            if abs(error) > 500:
                for place, x in known:
                    step = x * error >> 16
                    first_weights[place] += step
                    second_weights[place] += step
            node = 2 * node + bit
        text.append(characters[node])
        character = bytes(text[-1:])
        if character.isalnum() or character == b"_":
            word += character
            continue
        if word:
            name = token = word
        word = b""
        if character != b" ":
            token = character
        if quote:
            if character == quote:
                quote = b""
        elif character in b"'\"":
            quote = character
        elif character in b"([{":
            before_brackets.append(name + character)
        elif character in b")]}":
            before_brackets = before_brackets[:-1] or [b""]
        if character == b"\n":
            quote = first = b""
            before_brackets = [b""]
        elif not first and token != b"\n":
            first = token


def decode(packed: bytes, length: int, known: bytes = b"") -> bytes:
    """The first ``length`` characters of what `pgolf.submission.squeeze.encode` packed; more bytes may follow behind.

    The model first learns from ``known`` text: the program's own code, which is Python too.
    """
    text = bytearray()
    bits = predictions(text)
    probability = next(bits)
    numbers = {character: leaf for leaf, character in leaves().items()}
    for character in known:
        for bit in f"{numbers[character]:b}"[1:]:
            probability = bits.send(int(bit))
    low, high, code, place = 0, 0xFFFFFFFF, int.from_bytes(packed[:4], "big"), 4
    while len(text) < len(known) + length:
        middle = low + ((high - low) * probability >> 16)
        bit = code <= middle
        low, high = (low, middle) if bit else (middle + 1, high)
        while low >> 24 == high >> 24:
            low, high = low << 8 & 0xFFFFFFFF, high << 8 & 0xFFFFFFFF | 255
            code = code << 8 & 0xFFFFFFFF | packed[place]
            place += 1
        probability = bits.send(bit)
    return bytes(text[len(known) :])


def unpack() -> Path:
    """Write the program's sources into a folder of their own, where they are not there yet, and return it.

    Triton and tracebacks read sources from files, and worker processes import from the same folder. As it comes first
    where Python looks for modules, nobody else may write there, and nothing else may lie there.
    """
    root = Path(tempfile.gettempdir(), f"pgolf-{os.getuid()}-{DIGEST}")
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:  # a folder, and nobody else's
        sys.exit(f"{root} is no folder of yours alone: delete it, or set TMPDIR to a folder of your own")
    lock = os.open(root, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # one process unpacks; those that start with it wait
    body, kept = read_program()[1], root / "sources"
    text = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(text).hexdigest()[:16] != DIGEST:
        print("unpacking the sources, once; it takes some ten seconds", file=sys.stderr, flush=True)
        with suppress(IndexError):  # what is damaged may seem to go on behind the file's end
            text = decode(body, LENGTH, __spec__.loader.get_source("__main__").encode())
        if hashlib.sha256(text).hexdigest()[:16] != DIGEST:
            sys.exit("this program's file is damaged: its sources do not unpack; take another copy of it")
    parts = text.split(b"\0")
    ours = {root}
    for name, content in (("sources", text), ("program", body), *zip(parts[::2], parts[1::2], strict=True)):
        target = root / os.fsdecode(name)
        ours |= {target, *target.parents}
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for path in root.rglob("*"):
        if path not in ours and "__pycache__" not in (path.name, path.parent.name):
            sys.exit(f"{path} is not of this program: delete {root}")
    os.close(lock)
    return root


def read_program() -> tuple[dict[str, str], bytes]:
    """The settings in the program's file, and what comes after them."""
    _, settings, body = Path(__file__).parent.read_bytes().split(b"\n", 2)
    return json.loads(settings), body


def main() -> int:
    """Unpack, and call the command line; without a command, `run` with the program's settings."""
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("this program needs Python 3.11 or newer")
    sys.path.insert(0, str(unpack()))
    sys.modules.update(dict.fromkeys(ABSENT.split()))  # lest an installed package lend its own
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--preset" for argument in arguments):
        for name, value in read_program()[0].items():
            os.environ.setdefault(name, value)
    if not arguments or arguments[0].startswith("-"):
        arguments = ["run", *arguments]
    return importlib.import_module(ENTRY).main(arguments)  # what has been unpacked


if __name__ == "__main__":
    sys.exit(main())
