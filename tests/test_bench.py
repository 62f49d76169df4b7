"""The benchmarks: their timing, baselines against other references, every row at toy size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import data, greedy, learning, passes, regress, report, shapes, timing, wholebook
from benchmarks.shapes import ROWS, SHAPES


def test_ratios_are_taken_within_pairs_and_who_goes_first_alternates() -> None:
    order: list[str] = []
    times = timing.pairs(lambda: order.append("baseline"), lambda: order.append("ours"), most=4)
    assert order == ["baseline", "ours", "ours", "baseline", "baseline", "ours", "ours", "baseline"]
    assert len(times.ours) == len(times.baseline) == 4


def test_no_pair_begins_that_would_end_after_the_limit() -> None:
    times = timing.pairs(lambda: time.sleep(0.1), lambda: None, most=50, limit=0.35)
    assert 2 <= len(times.ours) <= 3
    least = timing.pairs(lambda: time.sleep(0.1), lambda: None, most=50, limit=0)
    assert len(least.ours) == 1


def test_a_record_holds_the_median_ratio_and_its_spread() -> None:
    times = timing.Times([4.0, 9.0, 8.0], [2.0, 3.0, 8.0])
    fast = times.fields()
    assert (fast["ratio"], fast["low"], fast["high"], fast["pairs"]) == (2.0, 1.0, 3.0, 3)
    assert (fast["baseline_seconds"], fast["ours_seconds"]) == (8.0, 3.0)
    assert times.fields(scale=4.0)["ratio"] == 8.0
    assert times.fields(faster=False)["high"] == 1.0
    many = timing.spread([float(n) for n in range(1, 10)])
    assert (many["low"], many["high"]) == (3.0, 7.0)  # quartiles


def test_a_cost_of_known_slope_is_found() -> None:
    found = timing.line([1, 2, 4, 8], [5 + 3 * n for n in (1, 2, 4, 8)])
    assert found["slope"] == pytest.approx(3) and found["intercept"] == pytest.approx(5)
    assert found["r2"] == pytest.approx(1)
    assert timing.line([1, 2, 4], [7, 28, 112])["power"] == pytest.approx(2)


def test_rows_are_the_same_however_they_are_read() -> None:
    n, d = 2 * data.BLOCK + 10, 6
    whole = data.rows(n, d)
    assert torch.equal(whole, torch.cat(list(data.blocks(n, d))))
    assert torch.equal(whole[data.BLOCK:], torch.cat(list(data.blocks(n, d, begin=data.BLOCK))))
    assert torch.linalg.matrix_rank((whole - whole.mean(0)).double()) == d


def test_both_regressions_are_numpys_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regress, "BLOCK", 100)  # several blocks a side
    n, d, fit = 900, 8, 549
    saes = [data.RandomSAE(d, [32, 4], seed) for seed in range(2)]
    x, given, codes = regress._whole(n, d, saes, "cpu")
    errors = [sae.error(x, own) for sae, own in zip(saes, codes, strict=True)]
    wide, expected = given.double().numpy(), []
    for error in errors:
        e = error.double().numpy()
        b = np.linalg.lstsq(wide[:fit], e[:fit], rcond=None)[0]
        left, held = e[fit:] - wide[fit:] @ b, e[fit:] - e[fit:].mean(0)
        expected.append([np.mean(1 - (left**2).sum(0) / (held**2).sum(0)),
                         1 - (left**2).sum() / (held**2).sum()])
    assert np.min(expected) > 0.05 and np.max(expected) < 0.95  # partly linear
    np.testing.assert_allclose(regress.dense(given, x, errors, fit), expected, atol=1e-5)
    fitted, held = (regress._blocks(x, codes, *ends) for ends in ((0, fit), (fit, n)))
    np.testing.assert_allclose(regress.streamed(fitted, held, saes), expected, atol=1e-5)


def test_sides_that_differ_are_not_timed() -> None:
    with pytest.raises(ValueError, match="differ"):
        regress._apart([[0.5, 0.5]], [[0.5, 0.6]])
    with pytest.raises(ValueError, match="differ"):
        regress._apart([[float("nan"), 0.5]], [[0.5, 0.5]])


def test_the_streamed_side_reads_the_rows_that_the_dense_one_holds() -> None:
    """As memory is measured: a block that straddles the two parts of the rows is cut."""
    rows, d, found = data.BLOCK + 900, 5, {}
    for side in ("dense", "streamed"):
        with getattr(regress, f"peak_{side}")("cpu", rows, d, [32, 4]) as work:
            found[side] = work()
    np.testing.assert_allclose(found["streamed"], found["dense"], atol=1e-5)


def test_dense_pursuit_of_one_step_is_the_projection_on_the_nearest_atom() -> None:
    atoms = data.atoms(40, 12)
    x = data.sparse_rows(30, atoms, 3)
    weight = greedy.dense(x, atoms, 1)
    product = x @ atoms.T
    nearest = product.argmax(1)
    expected = torch.zeros_like(weight)
    expected[torch.arange(30), nearest] = product[torch.arange(30), nearest]
    torch.testing.assert_close(weight, expected)
    left = [float((x - greedy.dense(x, atoms, k) @ atoms).norm()) for k in (1, 3, 6)]
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_random_saes_have_about_the_active_latents_asked_for(kind: str) -> None:
    made = data.sae(kind, 256, 8, 32)
    with torch.no_grad():
        active = (made.encode(data.block(512, 32, 4096)) != 0).float().sum(1).mean()
    assert 4 <= float(active) <= 12


def test_the_stock_trainer_starts_from_the_same_weights_and_scale() -> None:
    found = learning.run("cpu", 2048, 16, 48, 4, 128, 6, 20)
    assert found["steps"] == found["pairs"] == 6 - learning.WARM
    assert found["fvu"]["ours"] == pytest.approx(found["fvu"]["stock"], rel=learning.FVU)


def test_a_row_whose_fvu_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.52])
    monkeypatch.setattr(learning, "_fvu", lambda sae, held: next(values))
    with pytest.raises(ValueError, match="FVU"):
        learning.run("cpu", 2048, 16, 48, 4, 128, 4, 20)


def test_a_survey_that_is_off_is_refused(own_cache: Path) -> None:
    own_cache.mkdir()
    with passes.setting("cpu", "random", 40, [["topk", 48, 4]],
                        kept=40, d=16, bootstrap=20) as what:
        result = what.survey()
        assert passes._check(what, result) < 1e-3
        with torch.no_grad():
            what.opened[0].sae.b_dec.add_(0.5)
        with pytest.raises(ValueError, match="off by"):
            passes._check(what, result)


def test_the_shared_cache_is_left_alone(own_cache: Path) -> None:
    kept = own_cache / "activations" / "mine"
    kept.mkdir(parents=True)
    with passes.setting("cpu", "random", 40, [["topk", 48, 4]],
                        kept=40, d=16, bootstrap=20) as what:
        what.survey()
    assert kept.exists() and not (own_cache / "surveys").exists()
    assert not list((own_cache / "bench").glob("x-*"))
    assert passes.cache.root() == own_cache


def test_a_text_begins_again_where_it_ends() -> None:
    text = passes.corpus.Corpus(np.arange(6).reshape(3, 2), np.array([0, 0, 1]),
                                ("news/a", "plays/b"))
    longer = passes._first(text, 5)
    assert longer.tokens.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert longer.source.tolist() == [0, 0, 1, 2, 2]
    assert longer.domains == ["news", "news", "plays", "news", "news"]
    assert passes._first(text, 2).source.tolist() == [0, 0]


def test_what_a_survey_is_compared_with_is_x_and_the_error_in_float32(own_cache: Path) -> None:
    own_cache.mkdir()
    case = {"source": "random", "contexts": 10, "kept": 40, "d": 16, "saes_": [["topk", 48, 4]]}
    assert passes._both("cpu", **case) == 2 * 10 * 40 * 16 * 4


def test_the_time_of_the_book_is_that_of_a_build_that_kept_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "HOME", tmp_path)
    with pytest.raises(ValueError, match="has not been built; run 'make book PRESET=own'"):
        wholebook.run("cpu", "own", 100)
    folder, built = tmp_path / "_build/records/own", tmp_path / "_build/built-own.json"
    folder.mkdir(parents=True)
    (folder / "01_one.json").write_text(json.dumps({"peak_memory_gib": 1.5}))
    content = {"seconds": 60.0, "kept": ["01_one"], "notebooks": {"01_one": 40.0, "02_two": 40.0}}
    built.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="kept 01_one"):
        wholebook.run("cpu", "own", 100)
    built.write_text(json.dumps(content | {"kept": []}))
    found = wholebook.run("cpu", "own", 100)
    assert found["ours_seconds"] == 60 and found["ratio"] == 0.6 and found["peak_memory_gib"] == 1.5


def test_every_size_has_known_rows_that_name_what_they_use() -> None:
    for sizes in SHAPES.values():
        assert set(sizes) <= set(ROWS)
    for row in ROWS.values():
        assert row.sense in ("times", "of")
        for module in row.uses:
            assert (timing.HOME / "darkmatter" / f"{module}.py").exists()
    assert set(SHAPES["default"]) == set(ROWS)


def fake(monkeypatch: pytest.MonkeyPatch, *rows: str, broken: str = "") -> list[str]:
    """Rows that take no time; returns what was measured, in order."""
    called: list[str] = []

    def run(device: str, name: str) -> dict[str, Any]:
        called.append(name)
        if name == broken:
            raise RuntimeError("it broke")
        return {"ratio": 2.0, "low": 1.0, "high": 3.0, "pairs": 3}

    monkeypatch.setattr(wholebook, "run", run)
    monkeypatch.setitem(SHAPES, "toy", {name: {"": {"name": name}} for name in rows})
    for name in rows:
        monkeypatch.setitem(ROWS, name, shapes.Row("wholebook:run", name, "", "times", None, ()))
    return called


def test_an_interrupted_run_goes_on_and_a_failed_row_stops_no_other(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = fake(monkeypatch, "a", "b", "c", broken="b")
    words = ["--shapes", "toy", "--out", str(tmp_path)]
    assert bench.main(words) == 1
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert rows["toy / a"]["ratio"] == rows["toy / c"]["ratio"] == 2.0
    assert rows["toy / b"]["error"] == "RuntimeError: it broke"
    assert bench.main(words) == 1
    assert called == ["a", "b", "c", "b"]  # only what is not there yet
    assert bench.main([*words, "--again", "--rows", "c"]) == 0
    assert called[-1] == "c"
    # nothing more is begun
    assert bench.main([*words, "--again", "--limit", "0"]) == 0 and len(called) == 5


def test_a_failure_does_not_remove_a_figure_and_changed_sizes_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = fake(monkeypatch, "a")
    words = ["--shapes", "toy", "--out", str(tmp_path)]
    assert bench.main(words) == 0
    monkeypatch.setattr(report, "versions", lambda: {"torch": "another"})
    assert bench.main(words) == 0 and called == ["a", "a"]
    called = fake(monkeypatch, "a", broken="a")
    assert bench.main([*words, "--again"]) == 1
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["rows"]["toy / a"]["ratio"] == 2.0


@pytest.mark.parametrize("words", [["--rows", "nothing"], ["--shapes", "toy", "--rows", "book"],
                                   ["--shapes", "huge"]])
def test_what_there_is_not_is_refused(words: list[str], tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main([*words, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "there are" in (said := capsys.readouterr().err) or "choose from" in said
    assert not list(tmp_path.iterdir())


def test_a_file_is_named_after_the_machine() -> None:
    assert report.slug({"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert report.slug({"processor": "AMD EPYC 9B14", "cores": 2}) == "amd-epyc-9b14-2-cores"


@pytest.mark.slow
def test_every_row_runs_at_toy_size(tmp_path: Path, own_cache: Path) -> None:
    own_cache.mkdir()
    assert bench.main(["--shapes", "toy", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"].values()
    assert {row["row"] for row in rows} == set(SHAPES["toy"])
    for row in rows:
        assert row["low"] <= row["ratio"] <= row["high"] and row["pairs"] >= 1
        # The power of a cost so small may come out as anything.
        assert "over" in row or row["low"] > 0
        assert all(point["seconds"] > 0 and point["mib"] >= 0 for point in row.get("points", []))
        assert row["versions"]["torch"] and row["sizes"]
