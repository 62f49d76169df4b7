"""The training step that a GPU records: sae-lens's own, however many slots for dead latents.

A CPU records nothing; here, 'replaying' is taking the step. What only a GPU can show is in
test_device.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from darkmatter.presets import Training
from darkmatter.saes import topk
from darkmatter.saes import trainer as trainers
from darkmatter.saes.topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from darkmatter.saes.trainer import Trainer, slots_for
from tests import tiny
from tests.tiny import D, features

WIDTH, K, BATCH, STEPS = 96, 5, 64, 60


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sae(silent: int = 0) -> SparseTopKTrainingSAE:
    """The first ``silent`` latents never fire."""
    made = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=WIDTH,
                                                             k=K, device="cpu", dtype="float32"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.3)
        made.b_enc[:silent] = -10.0
    return made


def config(window: int) -> SAETrainerConfig:
    return SAETrainerConfig(total_training_samples=STEPS * BATCH,
                            train_batch_size_samples=BATCH, lr=1e-3, lr_end=0.0,
                            lr_warm_up_steps=5, lr_decay_steps=10, dead_feature_window=window,
                            feature_sampling_window=7)


def take(trainer: SAETrainer, steps: int) -> None:
    for step in range(steps):
        trainer.maybe_reset_sparsity()
        trainer.step(features(BATCH, seed=step) / 2)
        trainer.n_training_steps += 1


def same(ours: SAETrainer, theirs: SAETrainer, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert ours.n_frac_active_samples == theirs.n_frac_active_samples
    assert ours.lr_scheduler.get_last_lr() == theirs.lr_scheduler.get_last_lr()
    for name, weight in theirs.sae.named_parameters():
        torch.testing.assert_close(ours.sae.get_parameter(name),
                                   weight, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(("silent", "window"), [(0, 1000), (0, 1), (30, 2)])
def test_the_steps_are_those_of_sae_lens(silent: int, window: int) -> None:
    ours, theirs = (kind(cfg=config(window), sae=sae(silent), data_provider=iter(()))
                    for kind in (Trainer, SAETrainer))
    theirs.optimizer.param_groups[0]["fused"] = True
    for each in (ours, theirs):
        take(each, 12)
    assert bool(theirs.dead_neurons.any()) == (window < 1000)
    same(ours, theirs)


def test_room() -> None:
    dead = (0, 1, 32, 33, 64, 65, 2000, 4096)
    assert [slots_for(n, 4096) for n in dead] == [0, 64, 64, 128, 128, 256, 4096, 4096]
    assert slots_for(1, 32) == slots_for(32, 32) == 32  # no more than there are latents


@pytest.mark.parametrize("count", [0, 1, 5, D // 2 + 7, 40])
def test_more_room_than_dead_latents_changes_nothing(count: int) -> None:
    made, x = sae(), features(BATCH, seed=1) / 2
    dead = torch.zeros(WIDTH, dtype=torch.bool)
    dead[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))[:count]] = True
    losses, gradients = zip(*(stepped(made, x, dead, slots) for slots in (count, 64, WIDTH)),
                            strict=True)
    for other, own in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=1e-6)
        for mine, expected in zip(own, gradients[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_too_little_room_is_for_the_first_of_the_dead() -> None:
    made, x = sae(), features(BATCH, seed=1) / 2
    dead = torch.arange(WIDTH) % 3 == 0
    first = dead & (torch.arange(WIDTH) < 30)
    loss, alone = stepped(made, x, dead, 10)[0], stepped(made, x, first, 10)[0]
    # as many as there are weigh the loss
    torch.testing.assert_close(loss, alone * min(32, D // 2) / min(10, D // 2))


def stepped(made: SparseTopKTrainingSAE, x: Tensor, dead: Tensor,
            slots: int) -> tuple[Tensor, list[Tensor]]:
    """The auxiliary loss, and the gradients of the whole."""
    made.zero_grad()
    output, _ = made.losses(x, dead, slots)
    output.loss.backward()
    gradients = [weight.grad for weight in made.parameters() if weight.grad is not None]
    return output.losses["auxiliary_reconstruction_loss"].detach(), gradients


def test_dense_products_give_what_gathered_rows_give() -> None:
    made, x = sae(), features(BATCH, seed=1) / 2
    weights = made.W_enc.T, made.b_enc, made.W_dec
    index = torch.stack([torch.randperm(WIDTH, generator=torch.Generator().manual_seed(i))[:K]
                         for i in range(BATCH)])
    found = []
    sparse: Any = topk._SparseAutoencoder.apply
    dense: Any = topk._DenseAutoencoder.apply
    for sums in (lambda c: sparse(c, *weights, index),
                 lambda c: dense(c.detach(), made.b_dec, *weights, index)):
        made.zero_grad()
        out, value = sums(x - made.b_dec)
        (out + made.b_dec - x).pow(2).sum().backward()
        found.append([out, value, *(made.get_parameter(name).grad
                                    for name in ("W_enc", "b_enc", "W_dec", "b_dec"))])
    assert (found[0][1] == 0).any()  # some chosen latents are off
    for gathered, multiplied in zip(*found, strict=True):
        torch.testing.assert_close(multiplied, gathered, rtol=1e-4, atol=1e-3)


# ---- replaying ----

class Graph:
    """Stands for a CUDA graph: it replays what it is told to."""

    replay: Callable[[], object]


class Replaying(Trainer):
    """A trainer that 'records' on a CPU."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.replays = True
        self.steps = Counter[str]()

    def _aside(self, slots: int, graph: torch.cuda.CUDAGraph | None = None) -> TrainStepOutput:
        if graph is None:
            self.steps["as it comes"] += 1
            return self.learn(self.batch, slots)
        graph.replay = lambda: self._again(slots)
        return TrainStepOutput(self.batch, self.batch, self.batch, self.batch, self.batch, {})

    def _again(self, slots: int) -> None:
        self.steps["replayed"] += 1
        self.learn(self.batch, slots)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(trainers, "EVERY", 10)
    monkeypatch.setattr(trainers, "Trainer", Replaying)


@pytest.mark.usefixtures("replaying")
def test_each_room_is_recorded_once_and_the_steps_stay_the_same() -> None:
    ours, theirs = (kind(cfg=config(1000), sae=sae(), data_provider=iter(()))
                    for kind in (Replaying, Trainer))
    for each in (ours, theirs):
        take(each, 30)
    expected = {"as it comes": trainers.WARM, "replayed": 30 - trainers.WARM}
    assert ours.steps == expected  # type: ignore[attr-defined]
    same(ours, theirs)
    ours.slots = None
    ours.n_forward_passes_since_fired[:20] = 2000
    take(ours, 5)
    assert ours.slots == 64 and list(ours.recorded) == [0, 64]


class Cut(BaseException):
    """The power goes."""


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize("cut", [18, 33, 59])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(cut: int, tmp_path: Path) -> None:
    """Also where a checkpoint falls between two looks at the number of dead latents."""
    whole = trainer(tmp_path / "whole")
    whole.fit()
    first = trainer(tmp_path / "cut")
    first.data_provider = until(cut, first.data_provider)
    with pytest.raises(Cut):
        first.fit()
    second = trainer(tmp_path / "cut")
    assert 0 < second.n_training_steps <= cut and second.n_training_steps % 10
    second.fit()
    assert max(whole.warm) >= 64 and whole.dead_neurons.any()  # so the auxiliary loss took part
    same(second, whole)


def trainer(folder: Path) -> Trainer:
    x = tiny.acts(contexts=60).x
    recipe = Training(grid=((WIDTH, K),), tokens=STEPS * BATCH, distinct_tokens=len(x), batch=BATCH)
    made = trainers.trainer_of(tiny.preset(training=recipe), x, "", WIDTH, K, folder)
    made.cfg.dead_feature_window = 4
    if not made.n_training_steps:
        with torch.no_grad():
            made.sae.b_enc[:20] = -10.0
    return made


def until(step: int, batches: Iterator[Tensor]) -> Iterator[Tensor]:
    for _ in range(step):
        yield next(batches)
    raise Cut
