"""``dm.decompose`` on what people hold: against numpy, with known answers, with bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.utils.data import DataLoader

import darkmatter as dm
from darkmatter import survey
from tests import tiny

HOME = Path(__file__).resolve().parents[2]
ROWS, SOURCES = 2400, 60


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return tiny.features(ROWS).to(dtype)


def source() -> np.ndarray:
    return np.arange(ROWS) // (ROWS // SOURCES)


def shrunken(rows: Tensor) -> Tensor:
    """A reconstruction whose error is partly linear and partly not."""
    return 0.7 * rows + 0.2 * torch.tanh(rows)


def by_hand(rows: np.ndarray, target: np.ndarray, rebuilt: np.ndarray, fit: np.ndarray
            ) -> dict[str, float]:
    """FVU, FVU_nonlinear, R² of the vector and of the squared norm, by numpy's lstsq in float64."""
    wide, error = np.column_stack([rows, np.ones(len(rows))]), target - rebuilt
    left = error - wide @ np.linalg.lstsq(wide[fit], error[fit], rcond=None)[0]
    norm = np.square(error).sum(1)
    off = norm - wide @ np.linalg.lstsq(wide[fit], norm[fit], rcond=None)[0]
    held, variance = ~fit, np.square(target[~fit] - target[~fit].mean(0)).sum()
    spread = np.square(error[held] - error[held].mean(0)).sum(0)
    norm_spread = np.square(norm[held] - norm[held].mean()).sum()
    return {"fvu": np.square(error[held]).sum() / variance,
            "fvu_nonlinear": np.square(left[held]).sum() / variance,
            "r2_vector": float(np.mean(1 - np.square(left[held]).sum(0) / spread)),
            "r2_vector_weighted": 1 - np.square(left[held]).sum() / spread.sum(),
            "r2_norm": 1 - np.square(off[held]).sum() / norm_spread}


def check(result: dm.Decomposition, expected: dict[str, float], tolerance: float = 1e-4) -> None:
    for name, value in expected.items():
        assert getattr(result, name).value == pytest.approx(value, abs=tolerance), name


def fitted(result: dm.Decomposition, ids: np.ndarray) -> np.ndarray:
    """Which rows were fitted: those of the sources that the split takes."""
    from darkmatter.regression import split

    fit = split(ids, result.settings["fit_share"], result.settings["seed"])
    assert fit.sum() == result.n_fit and (~fit).sum() == result.n_eval
    return fit


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_it_is_least_squares_scored_on_other_sources(dtype: torch.dtype, tolerance: float) -> None:
    result = dm.decompose(shrunken, x(dtype), source=source())
    rows = x(dtype).double().numpy()
    rebuilt = shrunken(x(dtype)).double().numpy()
    check(result, by_hand(rows, rows, rebuilt, fitted(result, source())), tolerance)
    held_out = len(set(source()[~fitted(result, source())]))
    for draws in result.metrics.values():
        assert draws.low is not None and draws.high is not None and draws.value is not None
        assert draws.low <= draws.value <= draws.high and draws.sources == held_out


def test_the_forms_that_x_may_have_give_the_same(tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (ROWS, tiny.D))
    mapped[:] = x().numpy()
    loader: Any = DataLoader(torch.utils.data.TensorDataset(x()), batch_size=37)
    arrays = [part.numpy() for part in x().split(999)]
    forms: list[Any] = [x(), x().numpy(), mapped, list(x().split(100)), loader, arrays, Shards()]
    ids: list[Any] = [source()] * len(forms)
    # Sources may be a tensor, or names.
    forms += [Shards(), x()]
    ids += [torch.from_numpy(source()), [f"document {i:02}" for i in source()]]
    first, *others = (dm.decompose(shrunken, form, source=ids_of_form, draws=50)
                      for form, ids_of_form in zip(forms, ids, strict=True))
    for other in others:
        for name, draws in first.metrics.items():
            np.testing.assert_allclose(other.metrics[name].values, draws.values, atol=1e-5)
    # Without sources the rows are counted first, whatever form they have.
    alone, counted = (dm.decompose(shrunken, form, draws=50) for form in (x(), Shards()))
    np.testing.assert_allclose(counted.fvu.values, alone.fvu.values, atol=1e-5)
    assert counted.n_fit + counted.n_eval == ROWS


class Shards:
    """Batches made anew each time they are asked for, as from files; their number is not known."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from x().split(321)


def test_several_saes_share_the_rows_and_compare_draw_by_draw() -> None:
    saes = {"a": shrunken, "b": lambda rows: 0.9 * rows}
    both = dm.decompose(saes, x(), source=source())
    for name, sae in saes.items():
        alone = dm.decompose(sae, x(), source=source())
        np.testing.assert_allclose(both[name].fvu.values, alone.fvu.values, rtol=1e-6)
    difference = both["a"].fvu - both["b"].fvu
    np.testing.assert_allclose(difference.values, both["a"].fvu.values - both["b"].fvu.values)
    assert difference.low is not None and difference.high is not None
    assert difference.low <= float(difference) <= difference.high
    assert set(both.table.sae) == {"a", "b"} and len(both.plot().data) == 2
    elsewhere = dm.decompose(shrunken, x()[:1200], source=source()[:1200])
    with pytest.raises(dm.DarkmatterError, match="drawn from different sources"):
        _ = both["a"].fvu - elsewhere.fvu


def test_a_transcoders_error_is_of_its_target_and_predicted_from_x() -> None:
    mix = torch.randn(tiny.D, 5, generator=torch.Generator().manual_seed(1))
    target = torch.cat([x() @ mix, x()[:, :2].sin()], 1)

    def transcoder(rows: Tensor) -> Tensor:
        return 0.8 * torch.cat([target.new_zeros(len(rows), 5), rows[:, :2]], 1)

    result = dm.decompose(transcoder, x(), target=target, source=source())
    check(result, by_hand(x().double().numpy(), target.double().numpy(),
                          transcoder(x()).double().numpy(), fitted(result, source())))
    assert result.map.weight.shape == (tiny.D, 7)
    parts = transcoder(x()) + result.linear_error(x()) + result.nonlinear_error(x(), target)
    torch.testing.assert_close(parts, target)
    batches = dm.decompose(transcoder, list(x().split(100)), target=list(target.split(100)),
                           source=source())
    np.testing.assert_allclose(batches.r2_norm.values, result.r2_norm.values, atol=1e-4)


def test_an_sae_of_sae_lens_has_an_l0_and_the_surveys_numbers(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """The book's survey is this very decomposition, over activations on disk and stored codes."""
    acts, sae = tiny.acts(), tiny.loaded("toy", tiny.topk())
    result = dm.decompose(sae.sae, acts.x, source=acts.text.source[acts.context])
    refs = tiny.surveyed(monkeypatch, acts, sae)
    rows = tiny.metrics(survey.run(tiny.preset(bootstrap=1000), refs), "toy")
    for name, draws in result.metrics.items():
        np.testing.assert_allclose(rows.value[name], draws.value, atol=1e-5, err_msg=name)
    assert result.l0 is not None and result.l0.value == pytest.approx(rows.value["l0"])
    assert result.dead_share == pytest.approx(rows.value["dead_share"])


def test_known_answers() -> None:
    identity = dm.decompose(lambda rows: rows.clone(), x(), source=source())
    assert identity.fvu.value == 0 and identity.r2_vector.value is None
    assert "no variance" in identity.r2_vector.note
    shrunk = dm.decompose(lambda rows: 0.9 * rows, x(), source=source())
    assert shrunk.r2_vector.value == pytest.approx(1, abs=1e-6)
    assert shrunk.fvu_nonlinear.value == pytest.approx(0, abs=1e-8)
    weight = torch.randn(tiny.D, tiny.D, generator=torch.Generator().manual_seed(2)) / 9
    planted = dm.decompose(lambda rows: rows - rows @ weight - 3, x(), source=source())
    torch.testing.assert_close(planted.map.weight.float(), weight, atol=1e-4, rtol=1e-3)
    three = torch.full((tiny.D,), 3.0)
    torch.testing.assert_close(planted.map.bias.float(), three, atol=1e-3, rtol=1e-3)


def test_blocks_of_rows_take_the_place_of_few_sources() -> None:
    assert dm.decompose(shrunken, x(), source=source()).notes == {}
    note = dm.decompose(shrunken, x()).notes["rows"]
    assert "no sources were given: 40 contiguous blocks" in note
    for few in (1, 3):
        result = dm.decompose(shrunken, x(), source=np.arange(ROWS) % few)
        note = result.notes["rows"]
        assert f"{few} of the 20 sources that it takes: 40 contiguous blocks" in note
        assert result.fvu.low is not None and result.fvu.sources < 20


def test_how_it_reads() -> None:
    result = dm.decompose(shrunken, x(), source=source())
    fvu = result.fvu
    assert f"{fvu:.2f}" == f"{fvu.value:.2f} [{fvu.low:.2f}, {fvu.high:.2f}]"
    assert f"{fvu}" == f"{fvu:.3f}" and f"FVU{'':<27}{fvu}" in str(result)
    assert f"scored on {result.n_eval:,} others" in str(result)
    html = result._repr_html_()
    assert "R² of the error vector" in html and f"{fvu}" in html and "is linear in x" in html
    assert list(result.table.columns) == ["value", "low", "high", "note"]
    assert len(result.plot().data) == 2
    both = dm.decompose({"a": shrunken, "b": shrunken}, x(), source=source())
    assert f"{fvu}" in both._repr_html_() and "<td>b</td>" in both._repr_html_()


def test_the_json_has_the_keys_of_the_command_and_goes_through_links(tmp_path: Path) -> None:
    result, path = dm.decompose(shrunken, x(), source=source()), tmp_path / "real.json"
    (tmp_path / "link.json").symlink_to(path)
    result.to_json(tmp_path / "link.json")
    written = json.loads(path.read_text())
    numbers = ["l0", "dead_share", "fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted",
               "r2_norm", "norm_test"]
    assert list(written) == [*numbers, "n_fit", "n_eval", "intervals", "notes", "settings"]
    assert list(written["intervals"]) == numbers
    assert written["norm_test"].keys() == {"x", "sae", "error", "linear", "nonlinear"}
    assert written["intervals"]["fvu"] == [result.fvu.low, result.fvu.high]
    assert (tmp_path / "link.json").is_symlink()
    (tmp_path / "full").mkdir()
    with pytest.raises(dm.DarkmatterError, match="is a directory: give the name of a file in it"):
        result.to_json(tmp_path / "full")
    assert (tmp_path / "full").is_dir()


def marred(row: int) -> Tensor:
    """x with one value that is not a number."""
    rows = x()
    rows[row, 3] = torch.nan
    return rows


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: dm.decompose(shrunken, iter(x().split(100))), "x gives its batches only once"),
    (lambda: dm.decompose(shrunken, (rows for rows in x().split(100))), "gives its batches only"),
    (lambda: dm.decompose(shrunken, x(), target=iter([x()])), "the target gives its batches only"),
    (lambda: dm.decompose(shrunken, x(), target=[x()]), "x is one array and the target comes in"),
    (lambda: dm.decompose(shrunken, [x()], target=[x()[1:]]), "batches of different numbers"),
    (lambda: dm.decompose(lambda rows: rows[:, :3], x()), "was it trained at another site"),
    (lambda: dm.decompose(shrunken, x(), target=x()[:, :5]), r"returns \[2400, 16\] for x of"),
    (lambda: dm.decompose(lambda rows: (rows, rows), x()), "returns a tuple where a tensor"),
    (lambda: dm.decompose(lambda rows: rows.numpy(), x()), "returns a ndarray where a tensor"),
    (lambda: dm.decompose(lambda rows: rows * float("nan"), x()), "returns NaN or infinite values"),
    (lambda: dm.decompose("a path", x()), "is a str: give a sae-lens SAE, or a callable"),
    (lambda: dm.decompose(shrunken, x()[:20]), "takes at least 17 tokens to fit; there are"),
    (lambda: dm.decompose(shrunken, x()[:, :, None]), r"should be rows \[n, d\]"),
    (lambda: dm.decompose(shrunken, x()[:, 0]), r"should be rows \[n, d\]"),
    (lambda: dm.decompose(shrunken, torch.full((ROWS, 4), torch.nan)), "^x holds NaN or infinite"),
    (lambda: dm.decompose(shrunken, marred(0)), "^x holds NaN or infinite values"),
    (lambda: dm.decompose(shrunken, marred(ROWS - 1)), "^x holds NaN or infinite values"),
    (lambda: dm.decompose(shrunken, x(), target=marred(9)), "^The target holds NaN or infinite"),
    (lambda: dm.decompose(shrunken, x(), source=[1, 2]), "There are 2400 rows of x and 2 sources"),
    (lambda: dm.decompose(shrunken, x(), target=x()[:7]), "2400 rows of x and 7 of the target"),
    (lambda: dm.decompose(shrunken, ["one", "two"], source=[1, 2]), "A batch is a str"),
    (lambda: dm.decompose(shrunken, []), "There are 0 rows, and some are fitted on"),
    (lambda: dm.decompose({}, x()), "Give at least one SAE"),
])
def test_bad_input_gets_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(dm.DarkmatterError, match=sentence):
        call()


def test_batches_that_are_not_the_same_twice_are_told() -> None:
    class Leaky:
        left = 2

        def __iter__(self) -> Any:
            self.left -= 1
            return iter(x().split(100) if self.left > 0 else [])

    with pytest.raises(dm.DarkmatterError, match="2400 rows were expected and 0 came"):
        dm.decompose(shrunken, Leaky(), source=source())


def test_draws_have_arithmetic_and_a_reason_where_there_is_no_number() -> None:
    result = dm.decompose({"a": shrunken, "none": lambda rows: rows.clone()}, x(), source=source())
    whole, part = result["a"].fvu, result["a"].fvu_nonlinear
    ratio = part / whole
    np.testing.assert_allclose(ratio.values, part.values / whole.values)
    np.testing.assert_allclose((1 - ratio).values, 1 - ratio.values)
    np.testing.assert_allclose((2 * ratio + 1).values, 2 * ratio.values + 1)
    nothing = result["none"].r2_vector - 1
    assert (nothing.value, nothing.low, f"{nothing}") == (None, None, "–")
    assert "no variance" in nothing.note


def test_the_evaluator_logs_while_sae_lens_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.training import sae_trainer

    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(sae_trainer.wandb, "log", lambda values, step=None: logged.append(values))
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(
        d_in=tiny.D, d_sae=32, k=4, device="cpu", dtype="float32",
        normalize_activations="expected_average_only_in"))
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=5)
    config = SAETrainerConfig(total_training_samples=6400, train_batch_size_samples=64, lr=3e-3,
                              lr_end=0.0, logger=logger)
    batches = iter([x()[torch.randperm(ROWS)[:64]] for _ in range(200)])
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches,
                         evaluator=dm.Evaluator(x(), source()))
    trainer.activation_scaler.scaling_factor = 0.5
    trainer.fit()
    seen = [values for values in logged if "dark_matter/fvu" in values]
    assert len(seen) == 2 and seen[1]["dark_matter/fvu"] < seen[0]["dark_matter/fvu"] < 1
    assert 0 < seen[1]["dark_matter/fvu_nonlinear"] <= seen[1]["dark_matter/fvu"]
    last = dm.decompose(sae, x(), source=source())  # the scale is folded into it by now
    assert last.fvu.value == pytest.approx(seen[1]["dark_matter/fvu"], rel=0.2)


@pytest.mark.slow
def test_importing_brings_nothing_along() -> None:
    code = ("import sys, darkmatter as dm; assert 'torch' not in sys.modules; dm.decompose; "
            "heavy = {'sae_lens', 'transformers', 'transformer_lens'} & set(sys.modules); "
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], cwd=HOME, check=True)
