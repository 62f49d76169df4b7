"""``dm.decompose`` on what people hold in their hands: against numpy, with known answers, and with bad input."""

from __future__ import annotations

import json
import subprocess
import sys
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

HOME = Path(__file__).resolve().parents[1]
ROWS, SOURCES = 2400, 60


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return tiny.features(ROWS).to(dtype)


def source() -> np.ndarray:
    return np.arange(ROWS) // (ROWS // SOURCES)


def shrunken(rows: Tensor) -> Tensor:
    """A reconstruction whose error is partly linear and partly not."""
    return 0.7 * rows + 0.2 * torch.tanh(rows)


def by_hand(rows: np.ndarray, target: np.ndarray, rebuilt: np.ndarray, fit: np.ndarray) -> dict[str, float]:
    """FVU, FVU_nonlinear, both R² of the vector and of the squared norm, with numpy's lstsq in float64."""
    wide, error = np.column_stack([rows, np.ones(len(rows))]), target - rebuilt
    left = error - wide @ np.linalg.lstsq(wide[fit], error[fit], rcond=None)[0]
    norm = np.square(error).sum(1)
    off = norm - wide @ np.linalg.lstsq(wide[fit], norm[fit], rcond=None)[0]
    held, variance = ~fit, np.square(target[~fit] - target[~fit].mean(0)).sum()
    spread = np.square(error[held] - error[held].mean(0)).sum(0)
    return {"fvu": np.square(error[held]).sum() / variance, "fvu_nonlinear": np.square(left[held]).sum() / variance,
            "r2_vector": float(np.mean(1 - np.square(left[held]).sum(0) / spread)),
            "r2_vector_weighted": 1 - np.square(left[held]).sum() / spread.sum(),
            "r2_norm": 1 - np.square(off[held]).sum() / np.square(norm[held] - norm[held].mean()).sum()}


def check(found: dm.Decomposition, expected: dict[str, float], tolerance: float = 1e-4) -> None:
    for name, value in expected.items():
        assert getattr(found, name).value == pytest.approx(value, abs=tolerance), name


def fitted(found: dm.Decomposition, ids: np.ndarray) -> np.ndarray:
    """Which rows were fitted: those of the sources that the split takes."""
    from darkmatter.regression import split

    fit = split(ids, found.settings["fit_share"], found.settings["seed"])
    assert fit.sum() == found.n_fit and (~fit).sum() == found.n_eval
    return fit


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_it_is_least_squares_scored_on_other_sources(dtype: torch.dtype, tolerance: float) -> None:
    found = dm.decompose(shrunken, x(dtype), source=source())
    rows = x(dtype).double().numpy()
    rebuilt = shrunken(x(dtype)).double().numpy()
    check(found, by_hand(rows, rows, rebuilt, fitted(found, source())), tolerance)
    for each in found.metrics.values():
        assert each.low is not None and each.high is not None and each.value is not None
        assert each.low <= each.value <= each.high and each.sources == len(set(source()[~fitted(found, source())]))


def test_the_forms_that_x_may_have_give_the_same(tmp_path: Path) -> None:
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (ROWS, tiny.D))
    mapped[:] = x().numpy()
    loader: Any = DataLoader(torch.utils.data.TensorDataset(x()), batch_size=37)
    arrays = [part.numpy() for part in x().split(999)]
    forms: list[Any] = [x(), x().numpy(), mapped, list(x().split(100)), loader, arrays]
    first, *others = (dm.decompose(shrunken, form, source=source()) for form in forms)
    for other in others:
        for name, each in first.metrics.items():
            np.testing.assert_allclose(other.metrics[name].values, each.values, atol=1e-5)


def test_several_saes_share_the_rows_and_compare_draw_by_draw() -> None:
    saes = {"a": shrunken, "b": lambda rows: 0.9 * rows}
    both = dm.decompose(saes, x(), source=source())
    for name, sae in saes.items():
        alone = dm.decompose(sae, x(), source=source())
        np.testing.assert_allclose(both[name].fvu.values, alone.fvu.values, rtol=1e-6)
    difference = both["a"].fvu - both["b"].fvu
    np.testing.assert_allclose(difference.values, both["a"].fvu.values - both["b"].fvu.values)
    assert set(both.table.sae) == {"a", "b"} and len(both.plot().data) == 2
    elsewhere = dm.decompose(shrunken, x()[:1200], source=source()[:1200])
    with pytest.raises(dm.DarkmatterError, match="drawn from different sources"):
        both["a"].fvu - elsewhere.fvu


def test_a_transcoders_error_is_of_its_target_and_predicted_from_x() -> None:
    target = torch.cat([x() @ torch.randn(tiny.D, 5, generator=torch.Generator().manual_seed(1)), x()[:, :2].sin()], 1)

    def transcoder(rows: Tensor) -> Tensor:
        return 0.8 * torch.cat([target.new_zeros(len(rows), 5), rows[:, :2]], 1)

    found = dm.decompose(transcoder, x(), target=target, source=source())
    check(found, by_hand(x().double().numpy(), target.double().numpy(), transcoder(x()).double().numpy(),
                         fitted(found, source())))
    assert found.map.weight.shape == (tiny.D, 7)
    parts = transcoder(x()) + found.linear_error(x()) + found.nonlinear_error(x(), target)
    torch.testing.assert_close(parts, target)


def test_an_sae_of_sae_lens_has_an_l0_and_the_surveys_numbers(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """The book's survey is this very decomposition, over activations on disk and stored codes."""
    acts, sae = tiny.acts(), tiny.loaded("toy", tiny.topk())
    found = dm.decompose(sae.sae, acts.x, source=acts.text.source[acts.context])
    refs = tiny.surveyed(monkeypatch, acts, sae)
    rows = tiny.metrics(survey.run(tiny.preset(bootstrap=1000), refs), "toy")
    for name, each in found.metrics.items():
        np.testing.assert_allclose(rows.value[name], each.value, atol=1e-5, err_msg=name)
    assert found.l0 is not None and found.l0.value == pytest.approx(rows.value["l0"])
    assert found.dead_share == pytest.approx(rows.value["dead_share"])


def test_known_answers() -> None:
    identity = dm.decompose(lambda rows: rows.clone(), x(), source=source())
    assert identity.fvu.value == 0 and identity.r2_vector.value is None and "no variance" in identity.r2_vector.note
    shrunk = dm.decompose(lambda rows: 0.9 * rows, x(), source=source())
    assert shrunk.r2_vector.value == pytest.approx(1, abs=1e-6)
    assert shrunk.fvu_nonlinear.value == pytest.approx(0, abs=1e-8)
    weight = torch.randn(tiny.D, tiny.D, generator=torch.Generator().manual_seed(2)) / 9
    planted = dm.decompose(lambda rows: rows - rows @ weight - 3, x(torch.float64).float(), source=source())
    torch.testing.assert_close(planted.map.weight.float(), weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(planted.map.bias.float(), torch.full((tiny.D,), 3.0), atol=1e-3, rtol=1e-3)


def test_blocks_of_rows_take_the_place_of_few_sources() -> None:
    assert dm.decompose(shrunken, x(), source=source()).notes == {}
    assert "no sources were given: 40 contiguous blocks" in dm.decompose(shrunken, x()).notes["rows"]
    assert "3 of the 20 sources" in dm.decompose(shrunken, x(), source=np.arange(ROWS) % 3).notes["rows"]


def test_how_it_reads() -> None:
    found = dm.decompose(shrunken, x(), source=source())
    assert f"{found.fvu:.2f}" == f"{found.fvu.value:.2f} [{found.fvu.low:.2f}, {found.fvu.high:.2f}]"
    assert f"scored on {found.n_eval:,} others" in str(found) and "R² of the error vector" in found._repr_html_()
    assert list(found.table.columns) == ["value", "low", "high", "note"] and len(found.plot().data) == 2


def test_the_json_has_the_keys_of_the_command_and_goes_through_links(tmp_path: Path) -> None:
    found, path = dm.decompose(shrunken, x(), source=source()), tmp_path / "real.json"
    (tmp_path / "link.json").symlink_to(path)
    found.to_json(tmp_path / "link.json")
    written = json.loads(path.read_text())
    assert written.keys() >= {"l0", "dead_share", "fvu", "fvu_nonlinear", "r2_vector", "r2_vector_weighted", "r2_norm",
                              "norm_test", "n_fit", "n_eval", "intervals", "notes", "settings"}
    assert written["norm_test"].keys() == {"x", "sae", "error", "linear", "nonlinear"}
    assert written["intervals"]["fvu"] == [found.fvu.low, found.fvu.high] and (tmp_path / "link.json").is_symlink()
    (tmp_path / "full").mkdir()
    with pytest.raises(dm.DarkmatterError, match="is a directory: give the name of a file in it"):
        found.to_json(tmp_path / "full")
    assert (tmp_path / "full").is_dir()


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: dm.decompose(shrunken, iter(x().split(100))), "gives its batches only once"),
    (lambda: dm.decompose(lambda rows: rows[:, :3], x()), "was it trained at another site"),
    (lambda: dm.decompose(lambda rows: (rows, rows), x()), "returns a tuple where a tensor is expected"),
    (lambda: dm.decompose(lambda rows: rows * float("nan"), x()), "returns NaN or infinite values"),
    (lambda: dm.decompose("a path", x()), "is a str: give a sae-lens SAE, or a callable"),
    (lambda: dm.decompose(shrunken, x()[:20]), "takes at least 17 tokens to fit; there are"),
    (lambda: dm.decompose(shrunken, x()[:, :, None]), r"should be rows \[n, d\]"),
    (lambda: dm.decompose(shrunken, torch.full((ROWS, 4), torch.nan)), "x holds NaN or infinite values"),
    (lambda: dm.decompose(shrunken, x(), source=[1, 2]), "There are 2400 rows of x and 2 sources"),
    (lambda: dm.decompose(shrunken, x(), target=x()[:7]), "2400 rows of x and 7 of the target"),
    (lambda: dm.decompose(shrunken, ["one", "two"], source=[1, 2]), "A batch is a str"),
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
    found = dm.decompose({"a": shrunken, "none": lambda rows: rows.clone()}, x(), source=source())
    ratio = found["a"].fvu_nonlinear / found["a"].fvu
    np.testing.assert_allclose(ratio.values, found["a"].fvu_nonlinear.values / found["a"].fvu.values)
    np.testing.assert_allclose((1 - ratio).values, 1 - ratio.values)
    np.testing.assert_allclose((2 * ratio + 1).values, 2 * ratio.values + 1)
    nothing = found["none"].r2_vector - 1
    assert (nothing.value, nothing.low, f"{nothing}") == (None, None, "–") and "no variance" in nothing.note


def test_the_evaluator_logs_while_sae_lens_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.training import sae_trainer

    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(sae_trainer.wandb, "log", lambda values, step=None: logged.append(values))
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=tiny.D, d_sae=32, k=4, device="cpu", dtype="float32",
                                                normalize_activations="expected_average_only_in"))
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=5)
    config = SAETrainerConfig(total_training_samples=6400, train_batch_size_samples=64, lr=3e-3, lr_end=0.0,
                              logger=logger)
    batches = iter([x()[torch.randperm(ROWS)[:64]] for _ in range(200)])
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches, evaluator=dm.Evaluator(x(), source()))
    trainer.activation_scaler.scaling_factor = 0.5
    trainer.fit()
    seen = [values for values in logged if "dark_matter/fvu" in values]
    assert len(seen) == 2 and seen[1]["dark_matter/fvu"] < seen[0]["dark_matter/fvu"] < 1
    assert 0 < seen[1]["dark_matter/fvu_nonlinear"] <= seen[1]["dark_matter/fvu"]
    last = dm.decompose(sae, x(), source=source())  # the scale is folded into it by now
    assert last.fvu.value == pytest.approx(seen[1]["dark_matter/fvu"], rel=0.2)


def test_importing_brings_nothing_along() -> None:
    code = ("import sys, darkmatter as dm; assert 'torch' not in sys.modules; dm.decompose; "
            "heavy = {'sae_lens', 'transformers', 'transformer_lens'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], cwd=HOME, check=True)
