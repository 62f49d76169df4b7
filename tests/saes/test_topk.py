"""Sparse TopK training against sae-lens's own: the same losses, gradients, counts, saved models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from darkmatter.models import precision
from darkmatter.saes import loaded, references
from darkmatter.saes.kernels import sampled_dot, weighted_rows
from darkmatter.saes.topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from tests import tiny
from tests.tiny import D, features

WIDTH, K, BATCH = 48, 5, 64


@pytest.fixture
def float32_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose latents in float32, as sae-lens does, so that both classes choose the same ones."""
    monkeypatch.setattr(precision, "fast", lambda device: torch.float32)


def pair(seed: int = 0) -> tuple[SparseTopKTrainingSAE, TopKTrainingSAE]:
    """Both classes with the same weights; decoder norms differ, some tokens lack latents."""
    fields = {"d_in": D, "d_sae": WIDTH, "k": K, "device": "cpu",
              "dtype": "float32", "aux_loss_coefficient": 0.7}
    sparse = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields))
    stock = TopKTrainingSAE(TopKTrainingSAEConfig(**fields))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sparse.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.3)
        sparse.b_enc.sub_(2.5)
    stock.load_state_dict(sparse.state_dict())
    return sparse, stock


def batch(seed: int = 1) -> Tensor:
    return features(BATCH, seed=seed) / 2


def stepped(sae: TopKTrainingSAE, x: Tensor, dead: Tensor | None) -> TrainStepOutput:
    out = sae.training_forward_pass(TrainStepInput(x, {}, dead,
                                                   n_training_steps=0, is_logging_step=False))
    out.loss.backward()
    return out


def first_dead(count: int) -> Tensor:
    return torch.arange(WIDTH) < count


def chosen(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, d], rows [m, d], index [n, k] with repeats among tokens, weight [n, k]."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(WIDTH, generator=g)[:K] for _ in range(BATCH)])
    return (torch.randn(BATCH, D, generator=g), torch.randn(WIDTH, D, generator=g), index,
            torch.randn(BATCH, K, generator=g))


def test_sampled_dot_and_weighted_rows_are_the_sums_they_say() -> None:
    x, rows, index, weight = chosen()
    torch.testing.assert_close(sampled_dot(x, rows, index),
                               torch.einsum("nd,nkd->nk", x, rows[index]))
    torch.testing.assert_close(weighted_rows(index, rows, weight),
                               torch.einsum("nk,nkd->nd", weight, rows[index]))


def test_sampled_dot_works_without_gradients_and_leaves_none() -> None:
    x, rows, index, _ = chosen()
    rows.requires_grad_()
    with torch.no_grad():
        assert not sampled_dot(x, rows, index).requires_grad
    assert rows.grad is None


@pytest.mark.usefixtures("float32_choice")
@pytest.mark.parametrize("count", [None, 0, 3, 10, WIDTH - K], ids=lambda count: f"dead-{count}")
def test_losses_and_gradients_are_those_of_sae_lens(count: int | None) -> None:
    sparse, stock = pair()
    dead = None if count is None else first_dead(count)
    ours, theirs = stepped(sparse, batch(), dead), stepped(stock, batch(), dead)
    assert ours.losses.keys() == theirs.losses.keys()
    for name, loss in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name], loss, rtol=1e-5, atol=1e-6)
    auxiliary: Tensor = theirs.losses["auxiliary_reconstruction_loss"]  # type: ignore[assignment]
    assert bool(auxiliary > 0) == bool(count)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out, rtol=1e-4, atol=1e-5)
    for name, weight in stock.named_parameters():
        torch.testing.assert_close(sparse.get_parameter(name).grad,
                                   weight.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("float32_choice")
def test_the_latents_and_their_values_are_those_of_sae_lens() -> None:
    sparse, stock = pair()
    ours, theirs = stepped(sparse, batch(), None), stepped(stock, batch(), None)
    norm = stock.W_dec.norm(dim=-1)  # sae-lens ranks and reports latents times it
    dense = ours.feature_acts.to_dense()
    # some chosen latents are below zero, and count as off
    assert (theirs.feature_acts > 0).sum(1).min() < K
    torch.testing.assert_close(dense * norm, theirs.feature_acts, rtol=1e-4, atol=1e-5)
    assert torch.equal(dense > 0, theirs.feature_acts > 0)


@pytest.mark.any_processor
def test_choosing_in_bfloat16_costs_no_more_than_its_rounding(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast", lambda device: torch.bfloat16)
    sparse, _ = pair()
    x = batch()
    with torch.no_grad():
        scores = ((x - sparse.b_dec) @ sparse.W_enc + sparse.b_enc) * sparse.W_dec.norm(dim=-1)
        step = TrainStepInput(x, {}, None, n_training_steps=0, is_logging_step=False)
        on = sparse.training_forward_pass(step).feature_acts.to_dense() > 0
    best = scores.topk(K, dim=1).values
    worst = torch.where(on, scores, torch.inf).amin(1)  # of the latents it chose
    assert bool((worst > best[:, -1] - 2**-6 * scores.abs().amax(1)).all())
    agree = (on & (scores >= best[:, -1:])).sum() / on.sum()
    assert agree > 0.95


@pytest.mark.any_processor
@pytest.mark.usefixtures("float32_choice")
def test_sae_lens_counts_firing_and_dead_latents_the_same() -> None:
    trainers = []
    for sae in pair():
        config = SAETrainerConfig(total_training_samples=12 * BATCH,
                                  train_batch_size_samples=BATCH,
                                  lr=1e-3, lr_end=0.0, dead_feature_window=2)
        trainers.append(SAETrainer(cfg=config, sae=sae, data_provider=iter(())))
    ours, theirs = trainers
    seen = set()
    for step in range(12):
        for trainer in trainers:
            trainer.step(batch(step))
        assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
        assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
        seen.add(int(ours.dead_neurons.sum()))
    assert max(seen) > 0  # so the auxiliary loss took part
    for name, weight in theirs.sae.named_parameters():
        torch.testing.assert_close(ours.sae.get_parameter(name),
                                   weight, rtol=1e-3, atol=1e-4, msg=name)


def test_the_saved_model_is_a_stock_topk_sae_with_the_same_outputs(tmp_path: Path) -> None:
    sparse, _ = pair()
    sparse.save_inference_model(tmp_path)
    stock = SAE.load_from_disk(tmp_path)
    assert type(stock) is TopKSAE and stock.cfg.architecture() == "topk"
    ours, x = references.load_sae(str(tmp_path), tiny.preset()), batch()
    assert loaded.plain_topk(ours.sae)  # what the survey's fast path asks for
    with torch.no_grad():
        torch.testing.assert_close(stock(x), sparse(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x)[0], sparse(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stock.W_dec.norm(dim=-1), torch.ones(WIDTH))


def test_a_checkpoint_loads_back_and_keeps_each_latents_weights_together(tmp_path: Path) -> None:
    sparse, _ = pair()
    other, _ = pair(seed=5)
    sparse.save_model(tmp_path)
    other.load_weights_from_checkpoint(tmp_path)
    for name, weight in sparse.named_parameters():
        assert torch.equal(other.get_parameter(name), weight)
    assert sparse.W_enc.T.is_contiguous() and other.W_enc.T.is_contiguous()
