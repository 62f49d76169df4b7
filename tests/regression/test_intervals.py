"""The 95% intervals: coverage on simulated clustered data, and behaviour with few sources."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from darkmatter import regression as reg

D = 6
METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def simulate(rng: np.random.Generator, sources: int, unequal: float) -> dict[str, Tensor]:
    """Sums of sources that differ in size, mean, signal and noise, under a map that is fixed."""
    size = np.maximum(5, np.exp(rng.normal(3.5, unequal, sources))).astype(int)
    doc = np.repeat(np.arange(sources), size)
    noise_scale = np.exp(rng.normal(0, 0.35, (sources, 1)) + rng.normal(0, 0.25, (sources, D)))
    signal_scale = np.exp(rng.normal(0, 0.35, (sources, 1)))
    rows = rng.normal(size=(3, len(doc), D))
    signal = rng.normal(0, 0.4, (sources, D))[doc] + signal_scale[doc] * rows[0]
    residual = np.linspace(0.5, 2, D) * noise_scale[doc] * rows[1]
    x = signal + rows[2] + rng.normal(0, 0.5, (sources, D))[doc]
    columns = {"n": np.ones(len(doc)), "x": x, "xx": (x**2).sum(1)}
    columns |= {"e": signal + residual, "ee": (signal + residual) ** 2, "rr": residual**2}
    starts = np.r_[0, np.cumsum(size)[:-1]]
    return {k: torch.from_numpy(np.add.reduceat(v, starts, axis=0)) for k, v in columns.items()}


def population(unequal: float) -> dict[str, float]:
    """Each metric over so many sources that it is the truth to a thousandth or so."""
    rng, total = np.random.default_rng(12345), None
    for _ in range(20):
        part = {k: v.sum(0) for k, v in simulate(rng, 3000, unequal).items()}
        total = part if total is None else {k: total[k] + v for k, v in part.items()}
    assert total is not None
    return {metric: float(reg.STATISTICS[metric](total)) for metric in METRICS}


def intervals(sources: int, unequal: float, simulations: int) -> Iterator[dict[str, reg.Draws]]:
    rng = np.random.default_rng(sources)
    for seed in range(simulations):
        totals = reg.resample(simulate(rng, sources, unequal), np.arange(sources), n=500, seed=seed)
        yield {metric: reg.score(totals, metric) for metric in METRICS}


@pytest.mark.slow
@pytest.mark.parametrize(("sources", "unequal"),
                         [(60, 0.4), (60, 1.0), (100, 1.0), (20, 0.4), (8, 0.4)])
def test_coverage_is_92_to_98_percent(sources: int, unequal: float) -> None:
    truth, simulations = population(unequal), 400
    hits: dict[str, int] = dict.fromkeys(METRICS, 0)
    for scores in intervals(sources, unequal, simulations):
        for metric, draws in scores.items():
            assert draws.low is not None and draws.high is not None and draws.value is not None
            assert draws.low <= draws.value <= draws.high
            hits[metric] += draws.low <= truth[metric] <= draws.high
    coverage = {metric: count / simulations for metric, count in hits.items()}
    assert all(0.92 <= share <= 0.98 for share in coverage.values()), coverage


def test_intervals_follow_the_seed_and_nothing_else() -> None:
    sums = simulate(np.random.default_rng(0), 60, 0.4)
    first, again, other = (reg.score(reg.resample(sums, np.arange(60), seed=seed), "fvu")
                           for seed in (1, 1, 2))
    assert (first.values == again.values).all()
    assert first.value == other.value and first.low != other.low


def test_contexts_of_one_source_are_drawn_together() -> None:
    sums = simulate(np.random.default_rng(0), 60, 0.4)
    # Every source twice is no new information.
    doubled = {k: torch.cat([v, v]) for k, v in sums.items()}
    alone = reg.score(reg.resample(sums, np.arange(60)), "r2_vector")
    together = reg.score(reg.resample(doubled, np.tile(np.arange(60), 2)), "r2_vector")
    assert together.sources == 60 and together.n == 2 * alone.n
    assert (together.low, together.high) == (pytest.approx(alone.low), pytest.approx(alone.high))


def test_groups_without_rows_are_left_out() -> None:
    sums = simulate(np.random.default_rng(0), 30, 0.4)
    padded = {k: torch.cat([v, torch.zeros_like(v)]) for k, v in sums.items()}
    expected = reg.score(reg.resample(sums, np.arange(30)), "r2_vector_weighted")
    score = reg.score(reg.resample(padded, np.arange(60)), "r2_vector_weighted")
    assert (score.values == expected.values).all() and score.sources == expected.sources == 30


def test_few_sources_are_said_to_be_few() -> None:
    sums = simulate(np.random.default_rng(0), 6, 0.4)
    few = reg.score(reg.resample(sums, np.arange(6)), "fvu")
    assert few.low is not None and "rough interval" in few.note
    one = reg.score(reg.resample(sums, np.zeros(6, dtype=int)), "fvu")
    assert one.value == pytest.approx(few.value) and one.low is one.high is None
    assert one.note == "no interval: worth 1.0 equal sources"
