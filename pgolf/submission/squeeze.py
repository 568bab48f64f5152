"""Packing the exported program's sources: the half of the compressor in `unpack` that the program does without."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import lru_cache
from pathlib import Path

from pgolf.submission import unpack
from pgolf.submission.minify import absent_modules, package_sources, shortened

ENTRY = "pgolf.cli"  # the module whose `main` the program calls


def packed_package() -> bytes:
    """The packed sources and the archive with the code that unpacks them, the same bytes for the same sources."""
    text = "\0".join(part for file in package_sources().items() for part in file).encode("ascii")
    source = Path(unpack.__file__).read_text("utf-8")
    digest = hashlib.sha256(text).hexdigest()[:16]
    values = f'{len(text)}, "{digest}", "{" ".join(absent_modules())}", "{ENTRY}"'
    main = source.replace('LENGTH, DIGEST, ABSENT, ENTRY = 0, "", "", ""', f"LENGTH, DIGEST, ABSENT, ENTRY = {values}")
    main = shortened({"pgolf/submission/unpack.py": main})["pgolf/submission/unpack.py"].encode("ascii")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr(zipfile.ZipInfo("__main__.py", (1980, 1, 1, 0, 0, 0)), main, zipfile.ZIP_DEFLATED)
    return encode(text, main) + archive.getvalue()


@lru_cache(maxsize=2)  # it takes some ten seconds, and one process may export the same sources more than once
def encode(text: bytes, known: bytes = b"") -> bytes:
    """``text`` packed for `unpack.decode`, which must be given the same ``known`` text to learn from first.

    Raises ValueError for a character that `unpack.ALPHABET` lacks.
    """
    ways = {character: [int(bit) for bit in f"{leaf:b}"[1:]] for leaf, character in unpack.leaves().items()}
    foreign = set(text + known) - ways.keys()
    if foreign:
        raise ValueError(f"the sources have characters that cannot be packed: {bytes(sorted(foreign))!r}")
    packed = bytearray()
    bits = unpack.predictions(bytearray())
    probability = next(bits)
    low, high = 0, 0xFFFFFFFF
    for place, character in enumerate(known + text):
        for bit in ways[character]:
            if place >= len(known):
                middle = low + ((high - low) * probability >> 16)
                low, high = (low, middle) if bit else (middle + 1, high)
                while low >> 24 == high >> 24:
                    packed.append(high >> 24)
                    low, high = low << 8 & 0xFFFFFFFF, high << 8 & 0xFFFFFFFF | 255
            probability = bits.send(bit)
    return bytes(packed) + high.to_bytes(4, "big")
