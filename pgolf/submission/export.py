"""The program that is shipped and counted: the whole package as one executable file, ``train_gpt.py``.

    #!/usr/bin/env python3
    {"SEED": "7", …}              the run's settings, one line
    the packed sources            what `pgolf.submission.minify` leaves of them, packed by `pgolf.submission.squeeze`
    a zip archive                 ``__main__.py``: `pgolf.submission.unpack`, shortened

Python runs the archive at a file's end (PEP 441). The same sources give the same bytes. The exported program lacks the
modules that made it and exports what it was unpacked from, with its own run's settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pgolf
from pgolf.common.files import write_aside
from pgolf.config import RunConfig

# Settings of one machine or one run folder, which the program does not take along.
LOCAL_SETTINGS = ("preset_name", "run_id", "artifact_dir", "device", "cuda_graphs", "kernels", "dist_timeout_seconds")
# What an exported program was unpacked from, as `pgolf.submission.unpack` leaves it; the package itself has none.
UNPACKED_FROM = Path(pgolf.__file__).parents[1] / "program"


def export_program(path: str | os.PathLike, config: RunConfig | None = None) -> int:
    """Write the package as one program and return its bytes, which count against the cap.

    It takes some ten seconds, once in a process.

    Args:
        path: the file, usually ``train_gpt.py``; written aside and renamed.
        config: settings the program runs with unless its own environment, ``--set`` or ``--preset`` says otherwise;
            None: the defaults.

    Raises `pgolf.submission.minify.ExportError` naming a source file that cannot be exported.
    """
    if UNPACKED_FROM.is_file():
        body = UNPACKED_FROM.read_bytes()
    else:
        from pgolf.submission.squeeze import packed_package  # here, as the exported program goes without it

        body = packed_package()
    program = b"\n".join((b"#!/usr/bin/env python3", json.dumps(_settings(config)).encode(), body))
    write_aside(path, program)
    return len(program)


def _settings(config: RunConfig | None) -> dict[str, str]:
    """The settings that differ from the defaults, as environment variables."""
    if config is None:
        return {}
    defaults, chosen = (dataclasses.asdict(settings) for settings in (RunConfig(), config))
    return {
        name.upper(): str(value)
        for name, value in chosen.items()
        if value != defaults[name] and name not in LOCAL_SETTINGS
    }
