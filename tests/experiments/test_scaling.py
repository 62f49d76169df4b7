"""The power law, slopes, ladder: planted answers come back, little data is said to be little."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit

from darkmatter import survey
from darkmatter.errors import DarkmatterError
from darkmatter.experiments import scaling
from darkmatter.regression import Draws
from tests import tiny

WIDTHS = 2.0 ** np.arange(10, 15)
PLANTED = {"c": 0.15, "a": 0.09 * 1024**0.5, "m": 0.5}
CLEAN = PLANTED["c"] + PLANTED["a"] * WIDTHS ** -PLANTED["m"]


def drawn(fvu: np.ndarray, seed: int = 0, spread: float = 0.01, n: int = 200,
          effective: float = 60.0) -> list[Draws]:
    """Draws as of a text that moves every SAE alike, by 1% of its FVU."""
    other = 1 + spread * np.random.default_rng(seed).standard_normal(n)
    return [Draws(np.append(value, value * other), effective, 6000, 60) for value in fvu]


def reaches(draws: Draws, truth: float) -> bool:
    return draws.low is not None and draws.high is not None and draws.low <= truth <= draws.high


def size(draws: Draws) -> float:
    assert draws.low is not None and draws.high is not None
    return draws.high - draws.low


def test_the_fit_is_scipys() -> None:
    noisy = CLEAN + np.random.default_rng(1).normal(0, 5e-4, (4, 5))
    for fvu in (CLEAN, *noisy):
        theirs, _ = curve_fit(lambda w, c, a, m: c + a * w**-m, WIDTHS, fvu, p0=(0.1, 2, 0.4))
        np.testing.assert_allclose(scaling.fit(WIDTHS, fvu), theirs, rtol=2e-4)
    np.testing.assert_allclose(scaling.fit(WIDTHS, noisy)[2], scaling.fit(WIDTHS, noisy[2]))


def test_planted_parameters_lie_within_their_intervals() -> None:
    hits = []
    for seed in range(25):
        fvu = CLEAN + np.random.default_rng(100 + seed).normal(0, 4e-4, 5)
        law = scaling.power_law(WIDTHS, drawn(fvu, seed), seed)
        hits.append([reaches(getattr(law, name), value) for name, value in PLANTED.items()]
                    + [not law.doubt])
    assert (np.mean(hits, axis=0) >= 0.9).all()


def test_clean_data_leave_no_scatter() -> None:
    law = scaling.power_law(WIDTHS, drawn(CLEAN, spread=0))
    assert law.c.value == pytest.approx(0.15, abs=1e-4) and size(law.c) < 1e-3
    np.testing.assert_allclose([float(fvu) for fvu in law.curve(WIDTHS)], CLEAN, rtol=1e-5)


def test_few_points() -> None:
    with pytest.raises(DarkmatterError, match="3 or more widths"):
        scaling.power_law(WIDTHS[:2], drawn(CLEAN[:2]))
    three = scaling.power_law(WIDTHS[:3], drawn(CLEAN[:3]))
    assert "as many parameters as widths" in three.doubt
    through = [float(fvu) for fvu in three.curve(WIDTHS[:3])]
    np.testing.assert_allclose(through, CLEAN[:3], rtol=1e-5)
    bent = CLEAN + np.array([0, 2e-3, -2e-3, 0, 0])
    four, five = (size(scaling.power_law(WIDTHS[:n], drawn(bent[:n])).c) for n in (4, 5))
    assert four > 1.5 * five  # the fewer points, the less is known


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_flat_data(noise: float) -> None:
    fvu = 0.2 + np.random.default_rng(0).normal(0, noise, 5)
    law = scaling.power_law(WIDTHS, drawn(fvu))
    assert law.doubt.startswith("the fall of FVU with width is not clear")
    assert np.isfinite([law.c.values, law.a.values, law.m.values]).all()


def test_no_floor_is_not_taken_for_one() -> None:
    fvu = 2 * WIDTHS**-0.3 + np.random.default_rng(0).normal(0, 5e-4, 5)
    assert scaling.power_law(WIDTHS, drawn(fvu)).doubt == "its interval reaches zero"


def test_one_source_has_no_interval() -> None:
    law = scaling.power_law(WIDTHS, drawn(CLEAN, effective=1.0))
    assert "too few held-out sources" in law.doubt


def test_draws_of_other_sources_are_refused() -> None:
    first, *others = drawn(CLEAN)
    with pytest.raises(DarkmatterError, match="different sources"):
        scaling.power_law(WIDTHS, [replace(first, origin="another text"), *others])


def test_slopes() -> None:
    slope = scaling.slope(WIDTHS, drawn(0.3 - 0.02 * np.log2(WIDTHS / 1024)))
    np.testing.assert_allclose(slope.values[0], -0.02)
    np.testing.assert_allclose(slope.values[1:].std(), 0.02 * 0.01, rtol=0.2)  # 1%: other text


def test_the_ratio_of_slopes() -> None:
    fvu = drawn(0.3 - 0.02 * np.log2(WIDTHS / 1024))
    half = [draws / 2 for draws in fvu]
    assert scaling.slope_ratio(WIDTHS, fvu, half) == pytest.approx((0.5, 0.5, 0.5))
    constant = [draws * 0 + 0.1 for draws in fvu]
    assert scaling.slope_ratio(WIDTHS, fvu, constant) == pytest.approx((0, 0, 0), abs=1e-9)
    constant[-1] += 0.04  # one SAE alone makes a slope, and the interval says so
    value, low, high = scaling.slope_ratio(WIDTHS, fvu, constant)
    assert value is not None and low is not None and high is not None
    assert value == pytest.approx(-0.4) and low <= value < -0.3
    assert high == pytest.approx(0, abs=1e-9)
    one = drawn(CLEAN, effective=1.0)
    assert scaling.slope_ratio(WIDTHS, one, one)[1:] == (None, None)


def test_the_ladder() -> None:
    table = pd.DataFrame({"sae": list("abcdef"), "width": [1, 2, 4, 4, 8, 2],
                          "k": [32, 32, 32, 64, 32, 16]})
    table["l0"] = 32.0
    assert list(scaling.ladder(table)["sae"]) == ["a", "b", "c", "e"]
    assert list(scaling.ladder(table.iloc[3:4])["sae"]) == ["d"]
    measured = pd.DataFrame({"sae": list("abcd"), "width": [1, 2, 2, 4], "k": [None] * 4,
                             "l0": [60.0, 71, 58, 20]})
    assert list(scaling.ladder(measured)["sae"]) == ["a", "c"]


def test_the_curve_is_fitted_to_every_draw_of_the_survey(own_cache: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sources for every SAE: their draws, the fit's and the parts' go together."""
    opened = [tiny.loaded(f"w{width}", tiny.topk(width)) for width in (32, 64, 128)]
    preset = tiny.preset(saes=tiny.surveyed(monkeypatch, tiny.acts(), *opened))
    result = survey.run(preset)
    fvu = [result.draws(sae.name, "fvu") for sae in opened]
    law = scaling.power_law(np.array([32, 64, 128]), fvu)
    assert law.c.n == fvu[0].n and law.c.sources == fvu[0].sources
    each = scaling.fit(np.array([32, 64, 128]), np.stack([draws.values for draws in fvu], 1))
    np.testing.assert_allclose(law.c.values, each[:, 0])
    difference = law.c - result.draws("w32", "fvu_nonlinear")  # of one origin, so it can be taken
    nonlinear = result.draws("w32", "fvu_nonlinear").values
    np.testing.assert_allclose(difference.values, law.c.values - nonlinear)
    for sae, draws in zip(opened, fvu, strict=True):
        row = tiny.metrics(result, sae.name).loc["fvu", ["value", "low", "high"]]
        assert (draws.value, draws.low, draws.high) == pytest.approx(tuple(row))
