"""sae-lens's trainer, with its step recorded on a GPU as a CUDA graph and replayed: one launch instead of a hundred.

A recording repeats the same operations on the same memory, so the step reads its batch and its learning rate from
tensors, and makes room for a number of dead latents that is looked up at fixed steps. A CPU takes the same step
as it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from .topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, products

WARM = 3  # steps taken as they come before one is recorded, so that libraries and the optimiser have set themselves up
EVERY = 50  # steps between two looks at the number of dead latents, for which the processor waits for the GPU
LEAST = 64  # slots for dead latents, where there are any


def room(dead: int, width: int) -> int:
    """Slots for dead latents until the next look: a power of two, at least twice their number, or none for none."""
    return min(max(LEAST, 1 << (2 * dead - 1).bit_length()), width) if dead else 0


class Trainer(SAETrainer[SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig]):
    """Takes the steps that ``SAETrainer`` takes with a ``SparseTopKTrainingSAE``."""

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self.optimizer.param_groups[0]["fused"] = True  # torch's own single-pass Adam: the same update
        self.replays = torch.device(self.cfg.device).type == "cuda"
        self.room: int | None = None  # None: look at the next step
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, TrainStepOutput]] = {}  # by room
        self.warm = Counter[int]()
        self.batch = torch.zeros(self.cfg.train_batch_size_samples, self.sae.cfg.d_in, device=self.cfg.device)
        self.rate = torch.zeros((), device=self.cfg.device)
        if self.replays:
            self.stream = torch.cuda.Stream(self.batch.device)
            self.pool = torch.cuda.graph_pool_handle()  # recordings never run at once: they share their memory

    def fit(self) -> SparseTopKTrainingSAE:
        try:
            return super().fit()
        finally:
            self.recorded.clear()  # the GPU's memory is for the next SAE

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        super().save_trainer_state(checkpoint_path)
        self.room = None  # the next step looks, be it taken by this trainer or by one that resumes here

    def _reset_running_sparsity_stats(self) -> None:
        self.act_freq_scores.zero_()  # in place: recordings add to it
        self.n_frac_active_samples = 0

    def _train_step(self, sae: SparseTopKTrainingSAE, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        output = self._replayed(sae_in) if self.replays else self.learn(sae_in, int(self.dead_neurons.sum()))
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def learn(self, x: Tensor, room: int) -> TrainStepOutput:
        """The step itself: what it does depends on ``room`` and on shapes; all else is in tensors that it changes."""
        with products(fp32_precision="tf32"):  # on a GPU, for the auxiliary loss
            output, index = self.sae.losses(x, self.dead_neurons, room)
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
        """A step with the room that the last look asks for: as it comes the first few times, then replayed."""
        if self.room is None or self.n_training_steps % EVERY == 0:
            self.room = room(int(self.dead_neurons.sum()), self.sae.cfg.d_sae)
        self.batch.copy_(x)
        self.rate.fill_(self.optimizer.param_groups[0]["lr"])
        if self.warm[self.room] < WARM:
            self.warm[self.room] += 1
            return self._aside(self.room)
        if self.room not in self.recorded:
            graph = torch.cuda.CUDAGraph()
            self.recorded[self.room] = graph, self._aside(self.room, graph)
        graph, output = self.recorded[self.room]
        graph.replay()
        return output

    def _aside(self, room: int, graph: torch.cuda.CUDAGraph | None = None) -> TrainStepOutput:
        """``learn`` on a stream of its own, or only its recording.

        The optimiser reads the learning rate from a tensor here; the schedule and checkpoints keep it as a number.
        """
        group, here = self.optimizer.param_groups[0], torch.cuda.current_stream(self.batch.device)
        own = {name: group[name] for name in ("lr", "capturable")}
        group.update(lr=self.rate, capturable=True)
        self.stream.wait_stream(here)
        with torch.cuda.graph(graph, self.pool, self.stream) if graph else torch.cuda.stream(self.stream):
            output = self.learn(self.batch, room)
        here.wait_stream(self.stream)
        group.update(own)
        return output
