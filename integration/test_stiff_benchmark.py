"""The benchmark of stiff systems runs, and the figures that it is kept with are complete and say what is claimed."""

from __future__ import annotations

import json

import pytest

from benchmarks import stiff

EXPLICIT, IMPLICIT = ("dopri5", "bosh3"), ("kencarp3", "kencarp5")


def test_it_runs(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    stiff.main(["--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "stiff.json").read_text())
    assert record["problems"].keys() == set(stiff.QUICK_PROBLEMS)
    for rows in record["problems"].values():
        assert all("stopped_at" in rows[method] for method in EXPLICIT)
        assert all(rows[method]["error"] < 0.1 for method in IMPLICIT)
    losses = record["learning"]["losses"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert (tmp_path / "stiff.png").stat().st_size > 10_000
    assert "| linear, rates to 1e6 | kencarp3 |" in capsys.readouterr().out


def test_the_results_that_are_kept_show_what_is_claimed() -> None:
    record = json.loads((stiff.RESULTS / "stiff.json").read_text())
    assert record["problems"].keys() == stiff.PROBLEMS.keys()
    for rows in record["problems"].values():
        assert rows.keys() == set(stiff.METHODS)
        for method in EXPLICIT:  # none gets to the end
            assert rows[method]["steps"] == stiff.MOST_STEPS
        for method in IMPLICIT:
            assert rows[method]["steps"] < 400
            assert rows[method]["error"] < 100 * record["tolerance"]
    learning = record["learning"]
    assert learning["losses"] == sorted(learning["losses"], reverse=True) or learning["losses"][-1] < 1e-8
    assert learning["losses"][-1] < 1e-6 * learning["losses"][0]
    assert learning["worst_relative_error"] < 1e-2
    assert all("stopped_at" in learning["gradient"][method] for method in EXPLICIT)
