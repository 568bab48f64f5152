"""Results files: what is written is read, says how it was made, and keeps no machine's paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import results_files
from bench.trees import ROOT
from pgolf.common.files import FileError

PROVENANCE = ("bench", "chip", "versions", "commit", "date", "command")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file, meta = tmp_path / "x1" / "run.json", {"chip": "X1", "versions": {"torch": "2"}}
    rows = [{"case": "a", "kernels": {"k": [1.5, 2]}, "none": []}, {"case": "b, \u00b5", "kernels": {}}]
    results_files.write(file, meta, losses=[9.0, None, 1e-7], rows=rows, empty={})
    assert results_files.read(file) == {"meta": meta, "losses": [9.0, None, 1e-7], "rows": rows, "empty": {}}
    lines = file.read_text().splitlines()
    assert ' "losses": [9.0, null, 1e-07],' in lines and '   "kernels": {' in lines and '    "k": [1.5, 2]' in lines
    assert [path.name for path in file.parent.iterdir()] == ["run.json"], "nothing is left of writing aside"
    assert results_files.read_all(tmp_path).keys() == {"x1/run"}
    results_files.write(None, meta)


def test_the_shipped_files_are_as_the_writer_writes_them() -> None:
    for name, found in results_files.read_all().items():
        text = (results_files.RESULTS / f"{name}.json").read_text(encoding="utf-8")
        assert results_files.format_json(found) + "\n" == text, name
        for meta in (found["meta"], *(entry.get("meta", {}) for entry in found.get("cases", {}).values())):
            missing = {key for key in PROVENANCE if not meta.get(key)}
            assert not meta or missing <= set(meta.get("not_recorded", ())), name
            assert "/" not in (meta.get("command") or ""), name


def test_the_shipped_files_are_of_the_commits_that_they_name() -> None:
    """Every commit is in the history, and the trees that were measured are that commit's."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("needs a checkout with its history")
    for name, found in results_files.read_all().items():
        entries = [*found.get("cases", {}).values(), *found.get("parts", {}).values()]
        for meta in (found["meta"], *(entry.get("meta", {}) for entry in entries)):
            if meta.get("commit"):
                assert git("cat-file", "-t", meta["commit"]) == "commit", name
                for tree, of in meta.get("trees", {}).items():
                    assert git("rev-parse", f"{meta['commit']}:{tree}") == of, f"{name}, {tree}"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"meta": 1}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(FileError, match="x.json"):
        results_files.read(file)


def test_an_earlier_call_s_entries_keep_its_meta(tmp_path: Path) -> None:
    file, first, second, third = tmp_path / "x.json", {"date": 1}, {"date": 2}, {"date": 3}
    assert results_files.read_entries(file, first, "cases") == {}
    results_files.write(file, first, cases={"a": {"rows": [1]}})
    assert results_files.read_entries(file, first, "cases") == {"a": {"rows": [1]}}, "the same call"
    kept = results_files.read_entries(file, second, "cases")
    assert kept == {"a": {"meta": first, "rows": [1]}}
    results_files.write(file, second, cases=kept | {"b": {"rows": [2]}})
    kept = results_files.read_entries(file, third, "cases")
    assert {name: entry["meta"] for name, entry in kept.items()} == {"a": first, "b": second}


@pytest.mark.parametrize(
    ("words", "processes", "command"),
    [
        (
            ["/home/me/pgolf/bench/train_step.py", "--results", "/tmp/x.json"],
            1,
            "python -m bench.train_step --results x.json",
        ),
        (["/home/me/bench/__main__.py", "--case", "a"], 1, "python -m bench --case a"),
        (
            ["/v/bench/x.py", "--set", "data_dir=/home/me/data/", "--a=../b/c"],
            2,
            "torchrun --nproc_per_node=2 -m bench.x --set data_dir=data --a=c",
        ),
        (
            ["/usr/bin/pgolf", "run", "--variant", "kv cache, chunk 16", "/a=b/c d"],
            1,
            "pgolf run --variant 'kv cache, chunk 16' 'c d'",
        ),
    ],
)
def test_a_command_keeps_no_folder(words: list[str], processes: int, command: str) -> None:
    assert results_files.command_line(words, processes) == command


def test_a_call_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bench/x.py", "--run-dir", "/home/me/runs/a"])
    meta = results_files.describe("x", torch.device("cpu"), "abc")
    assert (meta["bench"], meta["commit"], meta["processes"]) == ("x", "abc", 1)
    assert meta["command"] == "python -m bench.x --run-dir a" and meta["date"].endswith("+00:00")
    assert meta["chip"] and meta["versions"]["torch"] == torch.__version__
    assert json.loads(results_files.format_json(meta)) == meta


def test_defaults_are_by_chip() -> None:
    assert results_files.results_path("h100", "a") == results_files.RESULTS / "h100" / "a.json"
    assert results_files.results_path("h100", "a", 2) == results_files.RESULTS / "h100" / "x2_a.json"
    assert results_files.results_path("cpu", "a") is None
