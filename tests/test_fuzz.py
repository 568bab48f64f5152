"""A few of the damaged files of `tests.fuzz`: none is taken for what it is not."""

from __future__ import annotations

import tracemalloc

import pytest

from pgolf.common.files import FileError
from tests import fuzz
from tests.fuzz import KINDS, Examples, main


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return Examples(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(examples: Examples, kind: str) -> None:
    count = {"artifact": 500, "archive": 500, "packed": 500, "sealed": 500, "bomb": 8}.get(kind, 100)
    results = examples.try_kind(kind, count, seed=0)
    assert sum(results.values()) == count and results["refused"] > 0.7 * count


def test_bombs_take_little_memory(examples: Examples) -> None:
    tracemalloc.start()
    try:
        for content in examples.bombs()[-len(fuzz.BOMB_SHAPES) :]:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(FileError, match="65,536 columns"):
                examples.read_artifact(content)
            assert tracemalloc.get_traced_memory()[1] - before < 200e6  # the rows' classes alone are 67 MB, twice
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "kind", ["artifact", "archive", "packed", "sealed", "checkpoint", "average", "data", "settings"]
)
def test_files_that_are_not_damaged_are_read(examples: Examples, kind: str) -> None:
    for number, content in enumerate(examples.originals[kind]):
        read = getattr(examples, f"read_{kind}")
        assert read(content, number) if kind == "data" else read(content)


def test_what_is_accepted_wrongly_is_shown(
    examples: Examples, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "Examples", lambda folder: examples)
    assert main(["--count", "20", "--kinds", "average"]) == 0
    assert "average: 2 in" in capsys.readouterr().out
    monkeypatch.setattr(examples, "read_average", lambda content: False)
    assert main(["--count", "20", "--kinds", "average"]) == 1
    assert "FAILED': 'average 0 of seed 0: accepted with other content" in capsys.readouterr().out
