"""The proof of a tree: what it is of, what its parts find, and what is kept of a part that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import distributed, prove, results_files, trees
from bench import test_time_training as ttt_bench
from pgolf.common.folder import RunFolder
from pgolf.config import RunConfig
from pgolf.data.shards import dataset_dir, write_shard

ROOT = Path(__file__).resolve().parent.parent
META = {"date": "2026-11-29T10:00:00+00:00", "commit": "abc1234def", "dirty": False, "chip": "X1", "versions": {}}
SUMMARY = {
    "data": {"seconds": 1.0},
    "train": {"seconds": 50.0, "steps": 77, "bits_per_byte": 1.85, "peak_memory_bytes": 20},
    "quantize": {"seconds": 90.0, "total_bytes": 15_960_201, "weight_bytes": 15_900_000},
    "eval": {"seconds": 5.0, "before": {"bits_per_byte": 1.87}, "quantized": {"bits_per_byte": 1.88}},
    "ttt": {"seconds": 60.0, "bits_per_byte": 1.81, "peak_memory_bytes": 14},
}
TINY = RunConfig.preset("record").replace(
    vocab_size=400,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    gate_attn_width=8,
    smear_gate_width=4,
    ttt_lora_rank=4,
    ttt_eval_seq_len=64,
    eval_seq_len=64,
    global_ttt_chunk_tokens=512,
    device="cpu",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with both folders and caches in them."""
    root = tmp_path / "tree"
    for name in ("kernels/tuned", "kernels/__pycache__", "pgolf", "pgolf/empty"):
        (root / name).mkdir(parents=True)
    files = ("kernels/a.py", "kernels/tuned.py", "kernels/tuned/x1.json", "kernels/__pycache__/a.pyc", "pgolf/b.py")
    for name in files:
        (root / name).write_text(name)
    (root / "pgolf" / "b.py").chmod(0o755)
    return root


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


@pytest.fixture
def proof(tmp_path: Path, results: Path) -> prove.Proof:
    return prove.Proof(results / "x1" / "proof.json", {**META, "trees": {"kernels": "1"}}, tmp_path / "run", tmp_path)


def git(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True)


def written(proof: prove.Proof) -> dict[str, Any]:
    return json.loads(proof.file.read_text())["parts"]


class TestTrees:
    """Hashes of folders, and what the check says of them."""

    def test_a_hash_is_git_s(self, tree: Path) -> None:
        (tree / ".gitignore").write_text("__pycache__/\n")
        if git("init", cwd=tree).returncode:
            pytest.skip("needs git")
        git("add", ".", cwd=tree)
        whole = git("write-tree", cwd=tree).stdout.decode().strip()
        for name, found in trees.tree_hashes(tree).items():
            assert found == git("rev-parse", f"{whole}:{name}", cwd=tree).stdout.decode().strip()

    def test_a_clean_checkout_has_the_commit_s_hashes(self, tmp_path: Path) -> None:
        archive = git("archive", "HEAD", *trees.TREES)
        if archive.returncode:
            pytest.skip("needs a git checkout")
        subprocess.run(["tar", "-x"], cwd=tmp_path, input=archive.stdout, check=True)
        for name, found in trees.tree_hashes(tmp_path).items():
            assert found == git("rev-parse", f"HEAD:{name}").stdout.decode().strip()

    def test_check_says_whose_the_newest_proof_is(self, tree: Path, results: Path) -> None:
        assert prove.check_line(results, tree).startswith("no proof yet: python -m bench.prove --data-dir DIR")
        parts = {name: {"status": "ok"} for name in prove.PARTS}
        meta = {**META, "trees": trees.tree_hashes(tree)}
        results_files.write(results / "h200" / "proof.json", meta, parts=parts)
        results_files.write(results / "h300" / "proof.json", {**meta, "date": "2026-11-28", "trees": {}}, parts={})
        results_files.write(results / "h400" / "proof.json", {**meta, "date": None}, parts={})
        (results / "h100").mkdir()
        (results / "h100" / "proof.json").write_text("{")
        about = "proof h200/proof.json of 2026-11-29, commit abc1234: "
        assert prove.check_line(results, tree) == about + "this tree"

        del parts["train_step"]
        parts["run"]["status"] = "failed"
        results_files.write(results / "h200" / "proof.json", meta, parts=parts)
        assert prove.check_line(results, tree) == about + "this tree, but run failed, train_step not run"

        (tree / "kernels" / "a.py").write_text("changed")
        line = prove.check_line(results, tree)
        assert line.startswith(f"{about}is of another kernels/ ({meta['trees']['kernels'][:7]}, here ")
        assert line.endswith("prove this one: python -m bench.prove --data-dir DIR") and "pgolf/" not in line

    def test_check_needs_no_torch_and_never_fails(self) -> None:
        script = (
            "import sys; from bench import prove; assert prove.main(['--check']) == 0 and 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1 and "proof" in done.stdout


class TestParts:
    """One part fails, the others are done; what is done is in the file."""

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--parts", "tests,nothing"], "there is no part nothing; parts: run, tests, program, audit"),
            (["--parts", ","], "name at least one part"),
            (["--parts", "run"], "the part run needs --data-dir"),
            ([], "the part run needs --data-dir"),
        ],
    )
    def test_bad_choices_say_why(self, options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as stopped:
            prove.main(options)
        assert stopped.value.code == 2 and message in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="would prove")
    def test_without_a_gpu_there_is_nothing_to_prove(self, capsys: pytest.CaptureFixture) -> None:
        assert prove.main(["--parts", "tests"]) == 2
        assert "torch finds no GPU" in capsys.readouterr().err

    def test_the_file_is_written_as_parts_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file, seen = tmp_path / "new" / "proof.json", []

        def part(name: str, error: Exception | None) -> Any:
            def run(proof: prove.Proof, figures: dict) -> None:
                figures["speed"] = 3
                seen.append({name: entry["status"] for name, entry in written(proof).items()})
                if error:
                    raise error

            return run

        errors = {
            "tests": None,
            "run": prove.PartFailed("no"),
            "program": prove.PartSkipped("x"),
            "train_step": OSError("y"),
        }
        monkeypatch.setattr(prove, "PARTS", {name: part(name, error) for name, error in errors.items()})
        monkeypatch.setattr(prove, "describe_machine", lambda *_: ("x1", {**META, "trees": {}}))
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        options = ["--results", str(file), "--data-dir", "data", "--parts"]
        assert prove.main([*options, "train_step,run,program,tests"]) == 1
        assert seen[-1] == {"tests": "ok", "run": "failed", "program": "skipped", "train_step": "running"}
        parts = json.loads(file.read_text())["parts"]
        assert [parts[name]["message"] for name in errors] == ["", "no", "x", "OSError: y"]
        assert parts["run"]["figures"] == {"speed": 3}, "what a part found before it failed is kept"

        again = {**META, "trees": {}, "date": "2026-11-30", "commit": "later"}
        monkeypatch.setattr(prove, "describe_machine", lambda *_: ("x1", again))
        assert prove.main([*options, "tests"]) == 0, "only what was chosen counts"
        found = json.loads(file.read_text())
        assert found["parts"].keys() == errors.keys(), "the same trees: parts add up"
        assert found["meta"] == again and "meta" not in found["parts"]["tests"]
        assert found["parts"]["run"]["meta"]["commit"] == META["commit"], "a part of an earlier call says of which"
        monkeypatch.setattr(prove, "describe_machine", lambda *_: ("x1", {**META, "trees": {"kernels": "2"}}))
        assert prove.main([*options, "tests"]) == 0
        assert json.loads(file.read_text())["parts"].keys() == {"tests"}, "another tree: a new proof"

    def test_no_part_begins_when_the_limit_is_over(self, proof: prove.Proof) -> None:
        proof.deadline = time.monotonic() + 1
        assert not proof.prove("tests")
        assert written(proof)["tests"]["status"] == "skipped" and "limit" in written(proof)["tests"]["message"]
        proof.parts["run"] = {"status": "ok"}
        assert not proof.prove("run") and written(proof)["run"] == {"status": "ok"}, "what is proved stays"

    def test_a_stopped_part_is_in_the_file(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(prove.PARTS, "tests", lambda proof, figures: sys.exit(143))
        with pytest.raises(SystemExit):
            proof.prove("tests")
        assert written(proof)["tests"]["message"] == "stopped from outside"

    def test_some_parts_run_beside_one_another(self, proof: prove.Proof) -> None:
        both, order = threading.Barrier(2, timeout=60), []
        proof.table = {name: lambda *_, name=name: order.append(name) for name in prove.PARTS}
        proof.table |= dict.fromkeys(("tests", "audit"), lambda *_: both.wait())
        assert proof.prove_all(("run", "tests", "audit", "train_step"))
        assert order == ["run", "train_step"] and {part["status"] for part in written(proof).values()} == {"ok"}

    def test_a_stop_ends_what_runs_beside(self, proof: prove.Proof) -> None:
        def stops(*_: Any) -> None:
            while not proof.running:
                time.sleep(0.01)
            raise SystemExit(143)

        proof.table = {"tests": stops, "audit": lambda proof, _: proof.call("-c", "import time; time.sleep(600)")}
        with pytest.raises(SystemExit):
            proof.prove_all(("tests", "audit"))
        assert written(proof)["audit"]["message"].startswith("exit status -15")

    def test_a_command_is_logged_and_its_end_is_the_message(self, proof: prove.Proof) -> None:
        assert proof.call("-c", "print(1)") == "1\n"
        with pytest.raises(prove.CallFailed, match="exit status 3: a | b") as failed:
            proof.call("-c", "print('a\\nb'); raise SystemExit(3)")
        assert failed.value.status == 3
        assert proof.log.read_text().count("$ python -c") == 2 and "a\nb" in proof.log.read_text()

    def test_the_limit_ends_a_command_and_what_it_started(self, proof: prove.Proof, tmp_path: Path) -> None:
        proof.deadline = time.monotonic() + 2
        script = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
        with pytest.raises(prove.CallFailed, match="the limit of 600 s ended it") as failed:
            proof.call("-c", script)
        child = int(failed.value.output)
        for _ in range(50):  # until it is gone, or a zombie that nobody has waited for
            state = Path(f"/proc/{child}/stat")
            if not state.exists() or state.read_text().split()[2] == "Z":
                break
            time.sleep(0.1)
        else:
            pytest.fail("the child still runs")

    def test_settings_of_the_caller_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGOLF_KERNELS", "reference")
        monkeypatch.setenv("SEED", "7")
        assert not {"PGOLF_KERNELS", "SEED"} & prove.clean_environment().keys()
        assert prove.clean_environment()["PATH"] == os.environ["PATH"]


class TestEachPart:
    """What a part runs and what it reads, with commands that only pretend."""

    def pretend(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, action: Any) -> list[list[str]]:
        calls = []

        def call(*command: str | Path, **options: Any) -> str:
            calls.append([str(word) for word in command])
            return action(calls[-1]) or ""

        monkeypatch.setattr(proof, "call", call)
        return calls

    def test_tests_are_counted(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
        output = "FAILED tests/a.py::b[cuda] - x\n1 failed, 12 passed, 3 skipped, 2 errors in 61.50s (0:01:01)\n"

        def fail(command: list[str]) -> None:
            raise prove.CallFailed("exit status 1", output, 1)

        calls = self.pretend(proof, monkeypatch, fail)
        assert not proof.prove("tests")
        counts = {"passed": 12, "failed": 1, "skipped": 3, "error": 2}
        assert written(proof)["tests"]["figures"] == {**counts, "failures": ["FAILED tests/a.py::b[cuda] - x"]}
        expression = calls[0][calls[0].index("-k") + 1]
        assert expression.startswith("cuda or ") and "test_varlen_attention.py" in expression
        assert Path(__file__).name not in expression

        self.pretend(proof, monkeypatch, lambda command: "5 skipped in 1.0s")
        assert not proof.prove("tests") and "no test has run" in written(proof)["tests"]["message"]

    def test_pytest_takes_the_expression(self, tmp_path: Path) -> None:
        both = "import pytest\n@pytest.mark.parametrize('device', ['cpu', 'cuda'])\ndef test_{}(device): pass\n"
        (tmp_path / "test_named.py").write_text(both.format("named"))
        (tmp_path / "test_whole.py").write_text('DEVICE = "cuda" if 1 else ""\n' + both.format("whole"))
        expression = " or ".join(["cuda", *prove.gpu_test_modules(tmp_path)])
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", "-v", "-k", expression]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
        assert sorted(line.split()[0].partition("::")[2] for line in shown.splitlines() if "PASSED" in line) == [
            "test_named[cuda]",
            "test_whole[cpu]",
            "test_whole[cuda]",
        ]
        assert prove._test_counts(shown)["passed"] == 3

    def leave_run(self, proof: prove.Proof, summary: dict[str, Any]) -> RunFolder:
        folder = RunFolder(proof.run_dir)
        folder.create(RunConfig(), {})
        for stage, figures in summary.items():
            folder.record(stage, figures)
        for path in (folder.program, folder.ema, folder.artifact(RunConfig()), folder.report):
            path.write_text("x")
        return folder

    def test_run_keeps_the_figures_of_every_stage(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
        proof.settings = ["val_doc_fraction=0.5"]
        calls = self.pretend(proof, monkeypatch, lambda command: self.leave_run(proof, SUMMARY) and "")
        assert proof.prove("run")
        figures = written(proof)["run"]["figures"]
        assert figures["stage_seconds"] == {"data": 1.0, "train": 50.0, "quantize": 90.0, "eval": 5.0, "ttt": 60.0}
        assert figures["bits_per_byte"] == {"last_weights": 1.85, "before": 1.87, "quantized": 1.88, "ttt": 1.81}
        assert figures["peak_memory_bytes"] == {"train": 20, "ttt": 14}
        assert (figures["rc"], figures["steps"], figures["total_bytes"]) == (0, 77, 15_960_201)
        (command,) = calls
        chosen = dict(pair.split("=", 1) for pair in command if "=" in pair)
        RunConfig.preset("record").replace(**chosen)
        assert chosen["max_wallclock_seconds"] == "20" and command[-1] == "val_doc_fraction=0.5"

    def test_a_run_that_stops_keeps_what_it_did(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(command: list[str]) -> None:
            self.leave_run(proof, {"train": SUMMARY["train"]})
            raise prove.CallFailed("exit status 2: pgolf: too large", "", 2)

        self.pretend(proof, monkeypatch, stop)
        assert not proof.prove("run")
        entry = written(proof)["run"]
        assert entry["message"].endswith("too large")
        assert entry["figures"]["rc"] == 2 and entry["figures"]["stage_seconds"] == {"train": 50.0}
        self.pretend(proof, monkeypatch, lambda command: "")
        assert not proof.prove("run") and "the summary lacks data, train" in written(proof)["run"]["message"]

    def test_test_time_training_must_improve(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
        worse = {**SUMMARY, "ttt": {"seconds": 1.0, "bits_per_byte": 1.9}}
        self.pretend(proof, monkeypatch, lambda command: self.leave_run(proof, worse) and "")
        assert not proof.prove("run") and "must improve" in written(proof)["run"]["message"]

    @pytest.mark.parametrize("off, right", [(0.0, True), (4e-5, True), (6e-5, False)])
    def test_program_has_the_run_s_score(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, off: float, right: bool
    ) -> None:
        assert not proof.prove("program") and written(proof)["program"]["status"] == "skipped"
        self.leave_run(proof, SUMMARY)
        proof.parts["run"] = {"status": "ok"}

        def score(command: list[str]) -> None:
            scored = RunFolder(command[command.index("--run-dir") + 1])
            assert sorted(path.name for path in scored.path.iterdir() if path != scored.summary_file) == [
                "config.json",
                "ema.pt",
                "model.pgolf",
            ]
            figures = SUMMARY[command[1]]
            scored.record(command[1], figures if command[1] == "eval" else {"bits_per_byte": 1.81 + off})

        calls = self.pretend(proof, monkeypatch, score)
        assert proof.prove("program") == right
        assert [call[:2] for call in calls] == [["train_gpt.py", "eval"], ["train_gpt.py", "ttt"]]
        assert written(proof)["program"]["figures"]["ttt"]["difference"] == pytest.approx(off)

    @pytest.mark.parametrize("verdict", ["passed", "failed"])
    def test_the_audit_s_findings_are_kept(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, verdict: str
    ) -> None:
        assert not proof.prove("audit") and written(proof)["audit"]["status"] == "skipped"
        self.leave_run(proof, SUMMARY)
        found = dict(check="causality", subject="ttt", verdict=verdict, evidence="it looks ahead")

        def audit(command: list[str]) -> None:
            assert command[:3] == ["-m", "pgolf", "audit"]
            folder = Path(command[command.index("--run-dir") + 1])
            findings = [found, found, *(found | {"verdict": other} for other in ("not checked", "noted"))]
            (folder / "audit.json").write_text(json.dumps({"findings": findings}))
            if verdict == "failed":
                raise prove.CallFailed("exit status 1", "", 1)

        self.pretend(proof, monkeypatch, audit)
        assert proof.prove("audit") == (verdict == "passed")
        figures = written(proof)["audit"]["figures"]
        assert figures[verdict] == 2
        text = "causality, ttt: it looks ahead"
        assert figures["failed_checks"] == [text] * 2 * (verdict == "failed")
        assert figures["other_checks"] == [f"not checked: {text}", f"noted: {text}"]
        assert figures["not checked"] == figures["noted"] == 1

    def test_a_program_of_another_tree_proves_nothing(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.leave_run(proof, SUMMARY)
        monkeypatch.setattr(prove, "export_program", lambda path, config: path.write_text("y"))
        assert not proof.prove("program") and "not of this tree" in written(proof)["program"]["message"]

    @pytest.mark.parametrize("part", ["train_step", "test_time_training"])
    def test_a_benchmark_s_results_are_kept_also_where_it_fails(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, part: str
    ) -> None:
        rows = {
            "train_step": [{"case": case, "tokens_per_s": 2.0} for case in ("before_loop", "after_loop")],
            "test_time_training": [{"length": 150, "seconds": 0.1}],
        }[part]

        def write(command: list[str], fail: bool = False) -> None:
            file = next(word for word in command if word.endswith(".json"))
            results_files.write(Path(file), {}, rows=rows, mix=None if fail else {"tokens_per_s": 1.0})
            if fail:
                raise prove.CallFailed("exit status 1", "", 1)

        self.pretend(proof, monkeypatch, write)
        assert proof.prove(part), written(proof)[part]
        figures = written(proof)[part]["figures"]
        self.pretend(proof, monkeypatch, lambda command: write(command, fail=True))
        assert not proof.prove(part) and written(proof)[part]["message"] == "exit status 1"
        assert written(proof)[part]["figures"].keys() == figures.keys()


class TestDistributed:
    """What is measured on several GPUs, with what the processes would do pretended."""

    @pytest.fixture
    def proof(self, tmp_path: Path, results: Path) -> prove.Proof:
        return prove.Proof(
            results / "x1" / "x4_distributed.json", {}, tmp_path / "run", tmp_path, processes=4, table=distributed.PARTS
        )

    def pretend(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, act: Any) -> list[tuple[list[str], dict]]:
        calls = []

        def call(*command: str | Path, **environment: str) -> str:
            calls.append(([*map(str, command)], environment))
            return act(calls[-1][0]) or ""

        monkeypatch.setattr(proof, "call", call)
        return calls

    def train(self, command: list[str], off: float = 0.0) -> None:
        folder = RunFolder(command[command.index("--run-dir") + 1])
        folder.create(RunConfig(), {})
        several = any("nproc_per_node" in word for word in command)
        entries = [{"kind": "train", "step": n, "loss": 9 - n + several * off} for n in range(24)]
        folder.log_metrics([*entries, {"kind": "val", "step": 24, "loss": 1.0}])
        speeds = {"tokens_per_second_before_loop": 390.0 if several else 100.0, "tokens_per_second_after_loop": 80.0}
        folder.record("train", {"startup_seconds": 1.0, "peak_memory_bytes": 5, **speeds})

    @pytest.mark.parametrize("off, right", [(0.0, True), (0.0078, True), (0.0082, False)])
    def test_steps_on_one_and_all(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, off: float, right: bool
    ) -> None:
        calls = self.pretend(proof, monkeypatch, lambda command: self.train(command, off))
        assert proof.prove("steps") == right
        figures = written(proof)["steps"]["figures"]["record"]
        assert figures["largest_difference"] == pytest.approx(off) and figures["ratio_before_loop"] == 3.9 / 4
        assert figures["on_4"]["tokens_per_second_each_after_loop"] == 20 and len(figures["on_1"]["losses"]) == 24
        assert [command[:2] for command, _ in calls[:2]] == [["-m", "pgolf"], ["-m", "torch.distributed.run"]]
        chosen = [dict(pair.split("=", 1) for pair in c if "=" in pair and pair[0] != "-") for c, _ in calls]
        for settings, tokens in zip(chosen[::2], ("786432", str(4 * 98_304)), strict=False):
            RunConfig.preset("record").replace(**settings)
            assert settings["train_batch_tokens"] == tokens and settings["iterations"] == "24"

    def test_two_nodes_share_the_gpus(self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
        one_at_a_time, folder = threading.Lock(), RunFolder(proof.run_dir / "nodes")

        def train(command: list[str]) -> None:  # both nodes are called at once, and rank 0 writes
            with one_at_a_time:
                if not folder.summary_file.exists():
                    self.train(command)

        calls = self.pretend(proof, monkeypatch, train)
        assert proof.prove("nodes"), written(proof)
        assert sorted(environment["CUDA_VISIBLE_DEVICES"] for _, environment in calls) == ["0,1", "2,3"]
        assert calls[0][0] == calls[1][0] and "--nproc_per_node=2" in calls[0][0]
        proof.processes = 3
        assert not proof.prove("nodes") and "no two equal nodes" in written(proof)["nodes"]["message"]

    @pytest.mark.parametrize("off, right", [(0.0, True), (4e-5, True), (6e-5, False), (float("nan"), False)])
    def test_scores_must_be_the_same(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, off: float, right: bool
    ) -> None:
        assert not proof.prove("scores") and written(proof)["scores"]["status"] == "skipped"
        folder = RunFolder(proof.run_dir)
        folder.create(RunConfig(), {})
        folder.artifact(RunConfig()).write_text("x")

        def score(command: list[str]) -> None:
            nats = torch.ones(10) + off * ("torch.distributed.run" in command)
            torch.save({"seconds": 2.0, "token_nats": nats}, command[command.index("--token-losses") + 1])

        self.pretend(proof, monkeypatch, score)
        assert proof.prove("scores") == right
        figures = written(proof)["scores"]["figures"]
        assert figures["on_4"] == {"seconds": 2.0} and figures["differing"] == (0 if off == 0 else 10)

    @pytest.mark.parametrize("ends", [True, False])
    def test_a_killed_process_ends_the_others(
        self, proof: prove.Proof, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: bool
    ) -> None:
        script = tmp_path / "launch.py"
        wait = "import sys, time; print('[eval]', flush=True); time.sleep(60)"
        script.write_text(
            "import os, subprocess, sys\n"
            f"start = [sys.executable, '-c', {wait!r}]\n"
            "ranks = [subprocess.Popen(start, env={**os.environ, 'RANK': str(rank)}) for rank in range(4)]\n"
            f"ranks[{3 if ends else 0}].wait()\n"
            "print('pgolf: rank 3 was killed')\nprint('torchrun says more')\n"
            "sys.exit(1)\n"
        )
        monkeypatch.setattr(prove, "launched", lambda processes, module: [str(script)])
        monkeypatch.setattr(distributed, "SECONDS_UNTIL_ENDED", 60.0 if ends else 0.5)
        monkeypatch.setattr(distributed, "SECONDS_UNDER_WAY", 0.1)
        found = distributed.stop_one(proof, "eval", ["eval"], signal.SIGKILL)
        assert (found["seconds"] is not None) == ends
        if ends:
            assert found["status"] == 1 and found["message"] == "pgolf: rank 3 was killed"

    @pytest.mark.skipif(torch.cuda.device_count() > 1, reason="would measure")
    def test_one_gpu_is_too_few(self, capsys: pytest.CaptureFixture) -> None:
        assert distributed.main(["--data-dir", "x"]) == 2 and "about several" in capsys.readouterr().err


class TestTestTimeTraining:
    """The benchmark of test-time training: documents, floor, prediction."""

    def test_documents_have_their_length(self) -> None:
        for text in (None, np.arange(4, 90)):
            tokens = ttt_bench.documents_of_length(50, 3, 100, text).view(3, 50)
            assert (tokens[:, 0] == 1).all() and (tokens[:, 1:] >= 4).all() and (tokens < 100).all()

    @pytest.mark.parametrize("targets", [1, 47, 48, 49, 150, 5700])
    def test_window_tokens_are_those_of_the_windows(self, targets: int) -> None:
        expected = 0
        for first in range(0, targets, 48):  # a window ends with its chunk and holds at most 2,048 tokens
            last = min(first + 48, targets)
            expected += last - max(last - 2048, 0)
        assert ttt_bench.window_tokens(targets, RunConfig.preset("record")) == expected

    def test_weights_are_the_record_s(self) -> None:
        assert ttt_bench.matrix_weights(RunConfig.preset("record"), 17) == 17 * 2_883_584

    def test_the_mix_is_made_as_published(self) -> None:
        lengths = ttt_bench.fineweb_lengths()
        assert len(lengths) == 601 and max(lengths) == 12_995
        for times, speed, split in (  # of the public script, and of commit bf3f823
            ((0.155, 0.241, 0.471, 0.950, 2.48, 7.47, 22.98), 31_344, 162),
            ((0.314, 0.491, 0.757, 1.395, 2.69, 6.85, 18.53), 28_869, 176),
        ):
            per_token = {n: seconds / (64 * n) for n, seconds in zip(ttt_bench.LENGTHS, times, strict=True)}
            mix = ttt_bench.predict(per_token, lengths)
            assert mix["tokens_per_s"] == pytest.approx(speed, rel=3e-4), "the times are rounded"
            assert round(mix["full_split_seconds_on_8_gpus"]) == split

    def test_it_runs_on_a_small_model(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        folder = dataset_dir(tmp_path, TINY.vocab_size)
        folder.mkdir(parents=True)
        write_shard(folder / "fineweb_val_000000.bin", np.array([1, *range(4, 300)]))
        file = tmp_path / "times.json"
        options = ["--quick", "--results", str(file), "--data-dir", str(tmp_path), "--set", "ttt_chunk_size=16"]
        results = ttt_bench.main(options, TINY)
        assert json.loads(file.read_text()) == json.loads(json.dumps(results))
        assert [row["length"] for row in results["rows"]] == sorted(ttt_bench.QUICK_LENGTHS, reverse=True)
        for row in results["rows"]:
            assert row["seconds"] > 0 and row["tokens_per_s"] == row["length"] * 4 / row["seconds"]
        assert results["mix"]["tokens_per_s"] > 0 and "FineWeb's mix" in capsys.readouterr().out
