"""The trainer of one SAE: sae-lens's, on a preset's recipe, its step recorded on a GPU.

The recording is a CUDA graph, replayed with one launch instead of a hundred. It repeats the same
operations on the same memory, so the step reads its batch and its learning rate from tensors, and
makes slots for a number of dead latents that is looked up at fixed steps. A CPU takes the same step
as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepOutput
from sae_lens.training import sae_trainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm import tqdm

from ..models import model
from . import checkpoints
from .topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, products

if TYPE_CHECKING:
    from ..presets import Preset

CHECKPOINTS = 8
WARM = 3  # steps taken as they come before one is recorded: what libraries set up, they do then
EVERY = 50  # steps between two looks at the number of dead latents, which wait for the GPU
LEAST = 64  # slots for dead latents, where there are any
sae_trainer.tqdm = partial(tqdm, disable=True)  # type: ignore  # our bar says which SAE it is


def device_of(preset: Preset) -> str:
    """Where to train: MPS lacks the sparse sums."""
    device = model.device_of(preset)
    return "cpu" if device.type == "mps" else str(device)


def trainer_of(preset: Preset, x: Tensor, stream: str, width: int, k: int, work: Path) -> Trainer:
    """A trainer on rows x [n, d], at its newest complete checkpoint in ``work``, or at the start.

    ``stream``: what the rows are known by.
    """
    recipe, device = preset.training, device_of(preset)
    # The initial weights depend on seed and size alone.
    torch.manual_seed(recipe.seed * 1_000_003 + width * 131 + k)
    about = SAEMetadata(model_name=preset.model, hook_name=preset.site,
                        context_size=preset.context_length, prepend_bos=preset.prepend_bos,
                        model_dtype=model.dtype_of(preset))
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=width, k=k, device=device, dtype="float32", metadata=about,
        normalize_activations="expected_average_only_in", decoder_init_norm=0.5))
    # The peak learning rate falls with the root of the width, and is the recipe's at 4096.
    steps = math.ceil(recipe.tokens / recipe.batch)
    config = SAETrainerConfig(
        total_training_samples=steps * recipe.batch, train_batch_size_samples=recipe.batch,
        lr=recipe.lr * (4096 / width) ** 0.5, lr_end=0.0,
        lr_warm_up_steps=int(recipe.warmup * steps), lr_decay_steps=int(recipe.decay * steps),
        dead_feature_window=max(1, 200_000 // recipe.batch), n_checkpoints=CHECKPOINTS - 1,
        checkpoint_path=str(work), device=device, logger=LoggingConfig(log_to_wandb=False))
    trainer = Trainer(cfg=config, sae=sae, data_provider=iter(()))
    # Activations are scaled to a mean norm of √d. Decoding begins at their mean, so that no latent
    # is spent on it.
    train, held = checkpoints.sides(x)
    sample = train[:16 * recipe.batch].float()
    trainer.activation_scaler.scaling_factor = float(x.shape[1] ** 0.5 / sample.norm(dim=-1).mean())
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0) * trainer.activation_scaler.scaling_factor)
    # The batches begin where the newest checkpoint ends.
    trainer.save_checkpoint_fn = lambda checkpoint_path: checkpoints.mark(
        trainer, held, checkpoint_path)
    checkpoints.resume(trainer, work)
    trainer.data_provider = checkpoints.batches(
        checkpoints.near(train, stream, device), recipe, trainer.n_training_steps, device)
    return trainer


def slots_for(dead: int, width: int) -> int:
    """Slots for dead latents until the next look: a power of two, at least twice their number."""
    return min(max(LEAST, 1 << (2 * dead - 1).bit_length()), width) if dead else 0


class Trainer(SAETrainer[SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig]):
    """Takes the steps that ``SAETrainer`` takes with a ``SparseTopKTrainingSAE``."""

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self.optimizer.param_groups[0]["fused"] = True  # torch's single-pass Adam: the same update
        self.replays = torch.device(self.cfg.device).type == "cuda"
        self.slots: int | None = None  # None: look at the next step
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, TrainStepOutput]] = {}  # by slots
        self.warm = Counter[int]()
        self.batch = torch.zeros(self.cfg.train_batch_size_samples, self.sae.cfg.d_in,
                                 device=self.cfg.device)
        self.rate = torch.zeros((), device=self.cfg.device)
        if self.replays:
            self.stream = torch.cuda.Stream(self.batch.device)
            self.pool = torch.cuda.graph_pool_handle()  # shared: no two recordings run at once

    def fit(self) -> SparseTopKTrainingSAE:
        try:
            return super().fit()
        finally:
            self.recorded.clear()  # the GPU's memory is for the next SAE

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        super().save_trainer_state(checkpoint_path)
        self.slots = None  # the next step looks, of this trainer or of one that resumes here

    def _reset_running_sparsity_stats(self) -> None:
        self.act_freq_scores.zero_()  # in place: recordings add to it
        self.n_frac_active_samples = 0

    def _train_step(self, sae: SparseTopKTrainingSAE, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        output = (self._replayed(sae_in) if self.replays
                  else self.learn(sae_in, int(self.dead_neurons.sum())))
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def learn(self, x: Tensor, slots: int) -> TrainStepOutput:
        """The step itself, on a batch x [n, d], with ``slots`` for so many dead latents.

        What it does depends on ``slots`` and on shapes; all else is in tensors that it changes.
        """
        with products(fp32_precision="tf32"):  # on a GPU, for the auxiliary loss
            output, index = self.sae.losses(x, self.dead_neurons, slots)
            # How often each latent fired, and for how many steps it has not.
            fired = torch.zeros_like(self.act_freq_scores)
            fired.index_add_(0, index.flatten(), (output.hidden_pre > 0).float().flatten())
            self.n_forward_passes_since_fired.add_(1).masked_fill_(fired > 0, 0)
            self.act_freq_scores.add_(fired)
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return replace(output, sae_out=output.sae_out.detach(), loss=output.loss.detach(),
                       losses={name: loss.detach() for name, loss in output.losses.items()})

    def _replayed(self, x: Tensor) -> TrainStepOutput:
        """One step, with the slots last counted: as it is the first few times, then a recording."""
        if self.slots is None or self.n_training_steps % EVERY == 0:
            self.slots = slots_for(int(self.dead_neurons.sum()), self.sae.cfg.d_sae)
        self.batch.copy_(x)
        self.rate.fill_(self.optimizer.param_groups[0]["lr"])
        if self.warm[self.slots] < WARM:
            self.warm[self.slots] += 1
            return self._aside(self.slots)
        if self.slots not in self.recorded:
            graph = torch.cuda.CUDAGraph()
            self.recorded[self.slots] = graph, self._aside(self.slots, graph)
        graph, output = self.recorded[self.slots]
        graph.replay()
        return output

    def _aside(self, slots: int, graph: torch.cuda.CUDAGraph | None = None) -> TrainStepOutput:
        """``learn`` on a stream of its own, or only its recording.

        The optimiser reads the learning rate from a tensor here; the schedule and checkpoints keep
        it as a number.
        """
        group, here = self.optimizer.param_groups[0], torch.cuda.current_stream(self.batch.device)
        before = {name: group[name] for name in ("lr", "capturable")}
        group.update(lr=self.rate, capturable=True)
        self.stream.wait_stream(here)
        with (torch.cuda.graph(graph, self.pool, self.stream) if graph
              else torch.cuda.stream(self.stream)):
            output = self.learn(self.batch, slots)
        here.wait_stream(self.stream)
        group.update(before)
        return output
