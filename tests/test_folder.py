"""A run's folder: one process at a time, nothing left half done, metrics that are whole lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder, RunFolderError
from pgolf.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent

HOLDS = """
import sys
from pgolf.common.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that has the folder's lock."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_the_second_one_says_who_is_there(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=f"is in use by process {holder.pid} on "), RunFolder(tmp_path).locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "the holder's"
    holder.communicate("\n")
    assert not list(tmp_path.iterdir())
    with RunFolder(tmp_path).locked():
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_killed_process_holds_nothing(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with RunFolder(tmp_path).locked():
        pass
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    leftovers = [".train_state.pt.41", ".summary.json.7", ".model.int6.ptz.9", "train_gpt.py.partial"]
    for name in [*leftovers, "ema.pt", ".notes.41"]:
        (tmp_path / name).write_text("")
    with RunFolder(tmp_path).locked():
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".notes.41", "ema.pt"]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(OSError, match="plain"), RunFolder(tmp_path / "plain").locked():
        pass


def test_a_run_is_one_once_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings come last: killed before them, the next start makes everything again."""
    written = []
    monkeypatch.setattr("pgolf.common.folder.write_aside", lambda path, text: written.append(path.name))
    folder = RunFolder(tmp_path)
    folder.create(RunConfig(), {}, {"world_size": 1})
    assert written == ["environment.json", "summary.json", "config.json"] and folder.files()[0] == folder.config_file


def train(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 0.5}


VALIDATED = {"kind": "val", "step": 2, "loss": 0.5}


@pytest.mark.parametrize("cut_off", ["", '{"kind": "tr', '{"kind": "train"', "\0\0\0"])
def test_metrics_are_cut_to_what_a_resumed_run_does_not_write_again(tmp_path: Path, cut_off: str) -> None:
    folder = RunFolder(tmp_path)
    folder.log_metrics([train(1), train(2), VALIDATED, train(3)])
    with folder.metrics.open("a") as file:
        file.write(cut_off)
    assert folder.cut_metrics(2) == [train(1), train(2)]
    assert folder.metrics.read_text() == f"{json.dumps(train(1))}\n{json.dumps(train(2))}\n"
    assert folder.cut_metrics(3) == [train(1), train(2)]


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"kind": "train", "step": "x"}', "\udcff"])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    folder = RunFolder(tmp_path)
    text = "\n".join([json.dumps(train(1)), line, json.dumps(train(2)), ""])
    folder.metrics.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunFolderError, match="metrics.jsonl, line 2, is damaged"):
        folder.cut_metrics(2)
    assert folder.metrics.read_bytes() == text.encode(errors="surrogateescape")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_do_not_fit_are_kept_for_later(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log_metrics([train(1)])
    path, folder.metrics = folder.metrics, Path("/dev/full")
    for step in (2, 3):
        with pytest.raises(FileError, match="/dev/full cannot be written: No space left on device"):
            folder.log_metrics([train(step)])
    folder.metrics = path
    folder.log_metrics([train(4)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [train(step) for step in range(1, 5)]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", b'{"seed": "\xff"}', "config.json is damaged: it is no JSON object"),
        ("config.json", b'{"sead": 1}', "config.json is damaged: there is no setting 'sead'; nearest: seed"),
        ("config.json", b"[]", "config.json is damaged: it is no JSON object"),
        ("summary.json", b"", "summary.json is damaged: it is no JSON object"),
        ("summary.json", b'{"data": 5}', "summary.json is damaged: its entry 'data' is no JSON object"),
    ],
)
def test_damaged_files_are_messages(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder = RunFolder(tmp_path)
    folder.create(RunConfig(), {})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=words):
        folder.config()
        folder.checked_files()
