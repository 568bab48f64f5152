"""The prediction for 8 H100s: its law, its sums, and what it reads."""

from __future__ import annotations

import math

import pytest

from bench import prediction
from bench.results_files import RESULTS, read_all
from bench.results_sections import judged_quantization
from pgolf.config import PRESETS, RunConfig


def test_the_law_goes_through_the_published_points() -> None:
    a, b, k = prediction.fitted()
    for steps, bpb in prediction.CURVE:
        assert a + b * steps**-k == pytest.approx(bpb, abs=1e-9)
    by_power, by_logarithm = prediction.from_steps(prediction.PUBLIC_STEPS)
    assert by_power == pytest.approx(0, abs=1e-12) and by_logarithm == pytest.approx(0, abs=1e-12)
    later, latest = prediction.from_steps(6000), prediction.from_steps(8000)
    assert all(low < high < 0 for low, high in zip(latest, later, strict=True))


def test_steps_follow_from_speed_and_loop() -> None:
    config = RunConfig.preset("record").replace(enable_looping_at=0.5)
    found = prediction.steps_in_time(3e6, 1e6, 0.5, config)
    assert found == pytest.approx(596 * 8 * 0.5 * 2e6 / 786_432)


@pytest.mark.parametrize("preset", ["record", "frontier"])
def test_contributions_add_up(preset: str) -> None:
    contributions, score, error = prediction.predict(read_all(RESULTS), preset)
    assert score == pytest.approx(sum((each.best + each.worst) / 2 for each in contributions))
    assert error == pytest.approx(math.hypot(*((each.worst - each.best) / 2 for each in contributions)))
    assert all(each.best <= each.worst for each in contributions)
    assert any(each.frontier for each in contributions) == (preset == "frontier")


def test_the_budget_says_what_one_more_brings() -> None:
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")
        for line in prediction.budget(read_all(RESULTS)).splitlines()
    }
    worth = [float(rows[what][-1].split()[0]) for what in ("training", "bytes")]
    assert -1e-4 < worth[0] < -1e-5 and -1e-5 < worth[1] < -1e-7


def test_the_budget_has_every_preset() -> None:
    header, _, *rows = prediction.budget(read_all(RESULTS)).splitlines()
    assert set(PRESETS) <= {cell.strip() for cell in header.split("|")}
    assert {row.count("|") for row in rows if row} == {header.count("|")}


def test_the_tax_ranges_over_all_weights_that_were_judged() -> None:
    results = read_all(RESULTS)
    shares = [prediction.tax_share(found) for found in judged_quantization(results).values()]
    contributions, _, _ = prediction.predict(results, "record")
    tax = next(each for each in contributions if "the public rule's tax" in each.what)
    found = [1 + each / prediction.PUBLIC_TAX for each in (tax.best, tax.worst)]
    assert found == pytest.approx([min(shares), max(shares)])


@pytest.mark.parametrize("without", [None, "quantization"])
def test_without_results_there_is_none(without: str | None) -> None:
    found = {name: each for name, each in read_all(RESULTS).items() if each["meta"]["bench"] != without}
    with pytest.raises(LookupError):
        prediction.predict(found if without else {}, "record")
