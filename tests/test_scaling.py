"""The power law, slopes and ladder: planted answers come back, and little data is said to be little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit

from darkmatter import scaling, survey
from darkmatter.errors import DarkmatterError
from tests import tiny

WIDTHS = 2.0 ** np.arange(10, 15)
PLANTED = {"c": 0.15, "a": 0.09 * 1024**0.5, "m": 0.5}
CLEAN = PLANTED["c"] + PLANTED["a"] * WIDTHS ** -PLANTED["m"]


def drawn(fvu: np.ndarray, seed: int = 0, spread: float = 0.01, n: int = 200) -> scaling.Draws:
    """Draws as of a text that moves every SAE alike, by 1% of its FVU."""
    other = 1 + spread * np.random.default_rng(seed).standard_normal((n, 1))
    return scaling.Draws(np.vstack([fvu, fvu * other]), np.vstack([fvu, fvu * other]) / 2, 60.0)


def reaches(draws: np.ndarray, truth: float) -> bool:
    _, low, high = scaling.estimate(draws, 60.0)
    return low is not None and high is not None and low <= truth <= high


def test_the_fit_is_scipys() -> None:
    noisy = CLEAN + np.random.default_rng(1).normal(0, 5e-4, (4, 5))
    for fvu in (CLEAN, *noisy):
        theirs, _ = curve_fit(lambda w, c, a, m: c + a * w**-m, WIDTHS, fvu, p0=(0.1, 2, 0.4))
        np.testing.assert_allclose(scaling.fit(WIDTHS, fvu), theirs, rtol=2e-4)
    np.testing.assert_allclose(scaling.fit(WIDTHS, noisy)[2], scaling.fit(WIDTHS, noisy[2]))


def test_planted_parameters_lie_within_their_intervals() -> None:
    found = []
    for seed in range(25):
        fvu = CLEAN + np.random.default_rng(100 + seed).normal(0, 4e-4, 5)
        law = scaling.power_law(WIDTHS, drawn(fvu, seed), seed)
        found.append([reaches(getattr(law, name), value) for name, value in PLANTED.items()] + [not law.doubt])
    assert (np.mean(found, axis=0) >= 0.9).all()


def test_clean_data_leave_no_scatter() -> None:
    law = scaling.power_law(WIDTHS, drawn(CLEAN, spread=0))
    c, low, high = scaling.estimate(law.c, 60.0)
    assert low is not None and high is not None
    assert c == pytest.approx(0.15, abs=1e-4) and high - low < 1e-3
    np.testing.assert_allclose(law.curve(WIDTHS)[0], CLEAN, rtol=1e-5)


def test_few_points() -> None:
    with pytest.raises(DarkmatterError, match="3 or more widths"):
        scaling.power_law(WIDTHS[:2], drawn(CLEAN[:2]))
    three = scaling.power_law(WIDTHS[:3], drawn(CLEAN[:3]))
    assert "as many parameters as widths" in three.doubt
    np.testing.assert_allclose(three.curve(WIDTHS[:3])[0], CLEAN[:3], rtol=1e-5)
    bent = CLEAN + np.array([0, 2e-3, -2e-3, 0, 0])
    size = []
    for n in (4, 5):
        _, low, high = scaling.estimate(scaling.power_law(WIDTHS[:n], drawn(bent[:n])).c, 60.0)
        assert low is not None and high is not None
        size.append(high - low)
    assert size[0] > 1.5 * size[1]  # the fewer points, the less is known


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_flat_data(noise: float) -> None:
    fvu = 0.2 + np.random.default_rng(0).normal(0, noise, 5)
    law = scaling.power_law(WIDTHS, drawn(fvu))
    assert law.doubt.startswith("the fall of FVU with width is not clear")
    assert np.isfinite([law.c, law.a, law.m]).all()


def test_no_floor_is_not_taken_for_one() -> None:
    fvu = 2 * WIDTHS**-0.3 + np.random.default_rng(0).normal(0, 5e-4, 5)
    assert scaling.power_law(WIDTHS, drawn(fvu)).doubt == "its interval reaches zero"


def test_one_source_has_no_interval() -> None:
    draws = drawn(CLEAN)._replace(effective=1.0)
    assert "too few held-out sources" in scaling.power_law(WIDTHS, draws).doubt


def test_slopes() -> None:
    fvu = 0.3 - 0.02 * np.log2(WIDTHS / 1024)
    found = scaling.slopes(WIDTHS, drawn(fvu).fvu)
    np.testing.assert_allclose(found[0], -0.02)
    np.testing.assert_allclose(found[1:].std(), 0.02 * 0.01, rtol=0.2)  # 1% of the slope: other text


def test_the_ratio_of_slopes() -> None:
    draws = drawn(0.3 - 0.02 * np.log2(WIDTHS / 1024))
    assert scaling.slope_ratio(WIDTHS, draws) == pytest.approx((0.5, 0.5, 0.5))
    constant = draws._replace(fvu_nonlinear=np.full_like(draws.fvu, 0.1))
    assert scaling.slope_ratio(WIDTHS, constant) == pytest.approx((0, 0, 0), abs=1e-9)
    constant.fvu_nonlinear[:, -1] = 0.14  # one SAE alone makes a slope, and the interval says so
    value, low, high = scaling.slope_ratio(WIDTHS, constant)
    assert low is not None and high is not None
    assert value == pytest.approx(-0.4) and low <= value < -0.3 and high == pytest.approx(0, abs=1e-9)
    assert scaling.slope_ratio(WIDTHS, draws._replace(effective=1.0))[1:] == (None, None)


def test_the_ladder() -> None:
    table = pd.DataFrame({"sae": list("abcdef"), "width": [1, 2, 4, 4, 8, 2], "k": [32, 32, 32, 64, 32, 16]})
    table["l0"] = 32.0
    assert list(scaling.ladder(table)["sae"]) == ["a", "b", "c", "e"]
    assert list(scaling.ladder(table.iloc[3:4])["sae"]) == ["d"]
    measured = pd.DataFrame({"sae": list("abcd"), "width": [1, 2, 2, 4], "k": [None] * 4, "l0": [60.0, 71, 58, 20]})
    assert list(scaling.ladder(measured)["sae"]) == ["a", "c"]


def test_the_draws_are_the_surveys(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same point and the same interval, and differences draw by draw."""
    opened = [tiny.loaded(f"w{width}", tiny.topk(width)) for width in (32, 64)]
    preset = tiny.preset(saes=tiny.surveyed(monkeypatch, tiny.acts(), *opened))
    result = survey.run(preset)
    found = scaling.draws(preset, result, ["w32", "w64"])
    for i, each in enumerate(opened):
        rows = tiny.metrics(result, each.name)
        for metric, draws in (("fvu", found.fvu), ("fvu_nonlinear", found.fvu_nonlinear)):
            assert scaling.estimate(draws[:, i], found.effective) == pytest.approx(
                tuple(rows.loc[metric, ["value", "low", "high"]]))
    difference = result.draws("w32", "fvu") - result.draws("w64", "fvu")
    np.testing.assert_allclose(difference.values, found.fvu[:, 0] - found.fvu[:, 1])
