"""The program that is shipped and counted: the whole package as one executable file, ``train_gpt.py``.

    #!/usr/bin/env python3
    {"SEED": "7", …}              the run's settings, one line
    5f0c…                         SHA-256 of the archive, in hexadecimal
    a zip archive                 ``__main__.py``, which is `pgolf.submission.program`; ``package.json``, the sources

Python runs an archive with a ``__main__.py`` that lies at the end of a file (PEP 441). The exported program lacks
`pgolf.submission.sources`, and exports the archive that it was unpacked from with its own run's settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pgolf
from pgolf.common.files import write_aside
from pgolf.config import RunConfig

# Settings of one machine or one run folder, which the program does not contain.
LOCAL_SETTINGS = ("preset_name", "run_id", "artifact_dir", "device", "cuda_graphs", "kernels", "dist_timeout_seconds")
# The archive of an exported program, as `pgolf.submission.program` leaves it; the package itself has none.
UNPACKED_FROM = Path(pgolf.__file__).parents[1] / "program"


def export_program(path: str | os.PathLike, config: RunConfig | None = None) -> int:
    """Write the package as one program and return its bytes, which count against the cap.

    Args:
        path: the file, usually ``train_gpt.py``; written to a temporary file and renamed.
        config: settings the program runs with unless its own environment, ``--set`` or ``--preset`` says otherwise;
            None: the defaults.

    Raises FileError if the file cannot be written.
    """
    content = exported_program(config)
    write_aside(path, content)
    return len(content)


def exported_program(config: RunConfig | None = None) -> bytes:
    """Return the content of the program that `export_program` writes."""
    if UNPACKED_FROM.is_file():
        archive = UNPACKED_FROM.read_bytes()
    else:
        from pgolf.submission.sources import packed_package  # imported here because the exported program lacks it

        archive = packed_package()
    return program_content(program_settings(config), archive)


def program_content(settings: dict[str, str], archive: bytes) -> bytes:
    """Return the content of a program's file."""
    digest = hashlib.sha256(archive).hexdigest()
    return b"\n".join((b"#!/usr/bin/env python3", json.dumps(settings).encode(), digest.encode(), archive))


def program_settings(config: RunConfig | None) -> dict[str, str]:
    """Return the settings that a program contains: those that differ from the defaults, as environment variables."""
    if config is None:
        return {}
    defaults, chosen = (dataclasses.asdict(settings) for settings in (RunConfig(), config))
    return {
        name.upper(): str(value)
        for name, value in chosen.items()
        if value != defaults[name] and name not in LOCAL_SETTINGS
    }
