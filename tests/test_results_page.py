"""The page of results: what it says follows from the results files, and what is stale is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import results_page, results_sections
from bench.results_files import read_all, write

ROOT = Path(__file__).resolve().parent.parent
META = {
    "chip": "NVIDIA X1 80GB",
    "processes": 1,
    "versions": {"torch": "2.11", "triton": "3.6"},
    "commit": "abcdef123",
    "date": "2026-11-29T10:00:00+00:00",
    "command": None,
}
README = "# A\n\n{}\nold\n{}\n\nmore\n".format(*results_page.MARKERS)


def row(provider: str, called: float, graph: float | None) -> dict[str, Any]:
    return {"provider": provider, "median_us": called, "graph_us": graph, "ceiling_share": 0.5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with results of two benchmarks, and a README with markers."""
    folder = tmp_path / "bench" / "results" / "x1"
    rows = [
        row("eager", 90.0, 80.0),
        row("compile", 30.0, 20.0),
        row("pgolf", 15.0, 10.0),
        row("pgolf_b", 1.0, 1.0),
    ]
    earlier = {"meta": {**META, "commit": "fedcba987"}, "rows": rows[:3]}
    cases = {"banks_full": {"rows": rows}, "older": earlier, "without ours": {"rows": rows[:2]}}
    write(folder / "newton_schulz.json", {"bench": "newton_schulz", **META}, cases=cases)
    steps = [
        {"provider": provider, "case": case, "tokens_per_s": speed}
        for provider, speed in (("pgolf", 3000.0), ("reference", 2000.0))
        for case in results_sections.CASES
    ]
    meta = {"bench": "train_step", **META, "note": "a note"}
    write(folder / "train_step.json", meta, rows=steps, floors_milliseconds=None)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_page_and_readme_are_what_the_results_files_give(capsys: pytest.CaptureFixture) -> None:
    results = read_all()
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results_page.page(results)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if results_page.MARKERS[0] in readme:
        assert results_page.insert(readme, results_page.headlines(results)) == readme
        assert results_page.main(["--check"]) == 0, capsys.readouterr().err
    assert len(results_page.headlines(results).splitlines()) <= 2 + 12


def test_both_files_are_written_and_what_is_stale_is_named(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert results_page.main(["--check"], root) == 1
    said = capsys.readouterr().err
    assert "docs/results.md is stale" in said and "README.md is stale" in said
    assert results_page.main([], root) == 0 and results_page.main(["--check"], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith(f"# A\n\n{results_page.MARKERS[0]}\n| ") and text.endswith(
        f"{results_page.MARKERS[1]}\n\nmore\n"
    )
    assert "old" not in text and "| X1 | abcdef1 |" in text
    page = root / "docs" / "results.md"
    page.write_text(page.read_text() + "by hand")
    capsys.readouterr()
    assert results_page.main(["--check"], root) == 1
    assert capsys.readouterr().err == "docs/results.md is stale: run python -m bench.results_page\n"


def test_a_readme_without_markers_is_left_alone(root: Path, capsys: pytest.CaptureFixture) -> None:
    (root / "README.md").write_text("# A\n")
    assert results_page.main([], root) == 1 and "README.md lacks the lines" in capsys.readouterr().err
    assert (root / "README.md").read_text() == "# A\n" and (root / "docs" / "results.md").is_file()


def test_ratios_are_of_one_call(root: Path) -> None:
    page = results_page.page(read_all(root / "bench" / "results"))
    kernels = [line for line in page.splitlines() if "newton_schulz.json" in line]
    figures = "15.0 | 10.0 | torch.compile | 20.0 | 2.00 | 50% |"
    assert [line.split(") | ")[1] for line in kernels] == [
        f"banks_full | {figures} abcdef1 |",
        f"older | {figures} fedcba9 |",
    ]
    steps = [line for line in page.splitlines() if "train_step.json" in line]
    assert [line.split(") | 1 | ")[1] for line in steps] == [
        "pgolf | 3,000 | – | 3,000 | – | – | abcdef1 |",
        "reference | 2,000 | 1.50 | 2,000 | 1.50 | – | abcdef1 |",
    ]
    assert "- train_step: a note." in page


def test_what_failed_has_no_figures(root: Path) -> None:
    part = {"status": "ok", "date": META["date"], "seconds": 1.0, "message": "", "figures": {}}
    tests = part | {"status": "failed", "message": "exit status 1"}
    tests |= {"figures": {"passed": 5, "failed": 1, "skipped": 0, "error": 1}}
    parts = {"tests": tests, "run": part | {"status": "failed", "figures": {"rc": 1}}}
    meta = {"bench": "prove", **META, "trees": {"kernels": "123456789"}}
    write(root / "bench" / "results" / "x1" / "proof.json", meta, parts=parts)
    results = read_all(root / "bench" / "results")
    page = results_page.page(results)
    assert "| tests | failed: exit status 1 |" in page and "GPU tests: 5 passed, 1 failed" in page
    assert "`kernels/` 1234567" in page and "every stage" not in page
    assert "| GPU tests | 5 passed, 2 failed |" in results_page.headlines(results)


def test_the_newest_results_are_in_the_readme(root: Path) -> None:
    folder = root / "bench" / "results"
    cases = {"banks_full": {"rows": [row("eager", 9.0, 9.0), row("pgolf", 3.0, 3.0)]}}
    for chip, date in (("x0", "2026-12-01"), ("x2", None)):
        write(
            folder / chip / "newton_schulz.json",
            {"bench": "newton_schulz", **META, "chip": chip, "date": date},
            cases=cases,
        )
    (line,) = [line for line in results_page.headlines(read_all(folder)).splitlines() if "Newton" in line]
    assert line.endswith("| 3 µs, 3.00 × as fast as PyTorch | x0 | abcdef1 |")


def test_gradient_errors_are_on_the_page(root: Path) -> None:
    groups = {"kernels": {"banks": [0.01, 1.0]}, "references": {"banks": [0.02, 1.0]}}
    meta = {"bench": "gradient_errors", **META}
    write(root / "bench" / "results" / "x1" / "gradient_errors.json", meta, batches=3, before_loop=groups)
    page = results_page.page(read_all(root / "bench" / "results"))
    assert "| before the loop | banks | 0.0100 | 0.0200 |" in page


def test_memory_errors_and_losses_of_all_providers_are_on_the_page(root: Path) -> None:
    ours = row("pgolf", 15.0, 10.0) | {"peak_mib": 1818.0, "error": 0.0024}
    rows = [
        row("liger", 30.0, None) | {"peak_mib": 122.3, "error": 0.0078},
        row("compile", 20.0, 19.0) | {"peak_mib": 1669.0, "error": 0.0024},
        row("compile_graph", 19.0, 19.0) | {"peak_mib": None, "error": 0.0024},
        ours,
    ]
    trained = [ours | {"losses": [4.0 - step / 60 for step in range(1, 61)]}]
    folder = root / "bench" / "results" / "x1"
    cases = {"forward_backward_16384x768x50304": {"rows": rows}, "forward": {"rows": rows[2:]}}
    write(folder / "linear_cross_entropy.json", {"bench": "linear_cross_entropy", **META}, cases=cases)
    write(folder / "optimizer_step.json", {"bench": "optimizer_step", **META}, cases={"small": {"rows": trained}})
    page = results_page.page(read_all(root / "bench" / "results"))
    shown = [line.split(" | ", 1)[1] for line in page.partition("All providers")[2].splitlines() if ".json)" in line]
    assert shown[:4] == [
        "forward_backward_16384x768x50304 | Liger | 30.0 | – | 122 | 0.07 | 7.8e-03 |",
        "forward_backward_16384x768x50304 | torch.compile | 20.0 | 19.0 | 1,669 | 0.92 | 2.4e-03 |",
        "forward_backward_16384x768x50304 | ours | 15.0 | 10.0 | 1,818 | 1.00 | 2.4e-03 |",
        "small | ours | 15.0 | 10.0 | 1,818 | 1.00 | 2.4e-03 |",
    ]
    assert "| case | provider | 1 | 2 | 3 | 5 | 10 | 20 | 40 | 60 |" in page
    assert "| small | ours | 3.9833 |" in page and "| 3.0000 |" in page


def test_what_an_audit_could_not_check_is_on_the_page(root: Path) -> None:
    figures = {"passed": 9, "noted": 1, "failed_checks": [], "other_checks": ["noted: wall time, run: 7 s"]}
    part = {"status": "ok", "date": META["date"], "seconds": 1.0, "message": "", "figures": figures}
    meta = {"bench": "prove", **META, "trees": {}}
    write(root / "bench" / "results" / "x1" / "proof.json", meta, parts={"audit": part})
    page = results_page.page(read_all(root / "bench" / "results"))
    assert "Its audit: 9 passed, 1 noted.\n\n- noted: wall time, run: 7 s\n" in page
