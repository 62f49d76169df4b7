"""Train the ladder: sae-lens's trainer, one recipe, one shared activation stream, resumable exactly.

The batch of a step is a function of (seed, step) alone, and a checkpoint holds weights, optimiser and counters, so a
run that was cut off and started again gives the same weights as one that was not.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training import sae_trainer
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm

from . import activations, cache, model, progress
from .errors import DarkmatterError
from .preset import Preset, Training
from .topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from .trainer import Trainer

VALIDATION = 16_384  # the last tokens of the stream, never trained on: what FVU is watched on
CHECKPOINTS = 8
AHEAD = 256  # steps whose rows a GPU is told at once
sae_trainer.tqdm = partial(tqdm, disable=True)  # type: ignore  # the bar here says which SAE it is
OTHERS = {"grid", "repeats", "elsewhere", "on_error", "distinct_elsewhere", "clear"}  # not of one SAE, or in its stream


def run(preset: Preset, only: tuple[int, int] | None = None, jobs: int = 1) -> dict[str, Path]:
    """Train every (width, L0) of the preset's grid that is not trained yet: {name: directory}; ``jobs`` at a time.

    A directory holds what ``sae_lens.SAE.load_from_disk`` reads and ``record.json``: how it was trained.
    """
    activations.training(preset)
    return side_by_side([(one, each) for each in ([(preset, *only)] if only else ladder(preset))], jobs)


def ladder(preset: Preset) -> list[tuple[Preset, int, int]]:
    """What the grid asks for: preset, width and L0 of each SAE, those with other seeds last."""
    first = [(preset, *pair) for pair in preset.training.grid]
    return first + [(seeded(preset, seed), *pair) for seed in (1, 2) for pair in preset.training.repeats]


def elsewhere(preset: Preset, jobs: int = 1) -> dict[str, Path]:
    """Train the SAEs at the preset's other sites that are not trained yet, on text read in one forward pass."""
    activations.trainings(preset.beside, list(preset.elsewhere))
    return side_by_side([(one, (preset.at(site), *preset.training.elsewhere)) for site in preset.elsewhere], jobs)


def one(preset: Preset, width: int, k: int) -> dict[str, Path]:
    """Train one SAE on the preset's stream: {name: directory}."""
    stream = activations.training(preset)
    return {name(preset, width, k): _train(preset, stream.x, stream.key, width, k)}


def seeded(preset: Preset, seed: int) -> Preset:
    """The same with the seed of its training moved on by ``seed``."""
    return replace(preset, training=replace(preset.training, seed=preset.training.seed + seed))


Task = tuple[Callable[..., dict[str, Path]], tuple[Any, ...]]


def side_by_side(tasks: Sequence[Task], jobs: int) -> dict[str, Path]:
    """Call each function with its arguments, ``jobs`` processes of one thread at a time; join what they return."""
    if jobs == 1 or len(tasks) < 2:
        results = [call(*words) for call, words in progress.bar(tasks, "trained", "SAEs")]
    else:
        spawned = multiprocessing.get_context("spawn")
        progress.in_lines()  # several processes cannot draw on one
        with ProcessPoolExecutor(jobs, spawned, _begin) as pool:
            running = [pool.submit(call, *words) for call, words in tasks]
            for _ in progress.bar(as_completed(running), "trained", "SAEs", total=len(tasks)):
                pass
            results = [each.result() for each in running]
    return {name: folder for result in results for name, folder in result.items()}


def _begin() -> None:
    """In a process beside others."""
    torch.set_num_threads(1)
    progress.in_lines()


def name(preset: Preset, width: int, k: int, on: str = "") -> str:
    """The name an SAE ships under, such as 'smollm2-l15-w4096-k32', or 'smollm2-l15-mlp_out-w4096-k32'.

    ``on``: what it was trained on instead of the site's activations, as in 'smollm2-l15-on-linear-w2048-k32'.
    """
    layer, kind = re.sub(r"hook_|attn\.", "", preset.site).split(".")[1:]
    place = ("" if kind == "resid_post" else f"-{kind}") + (on and f"-{on}")
    seed = f"-s{preset.training.seed}" if preset.training.seed else ""
    return f"{Path(preset.model).name}-l{layer}{place}-w{width}-k{k}{seed}"  # a model's path leads out of the cache


def batch_rows(recipe: Training, rows: int, step: int) -> torch.Tensor:
    """Rows [batch] of the stream that step ``step`` sees: consecutive pieces of a fresh shuffle each epoch."""
    per_epoch = rows // recipe.batch
    if not per_epoch:
        raise DarkmatterError(f"A batch of {recipe.batch} tokens needs more than the {rows} training tokens there are; "
                              "ask for more distinct_tokens or a smaller batch.")
    epoch, at = divmod(step, per_epoch)
    return _order(rows, recipe.seed * 1_000_003 + epoch)[at * recipe.batch:(at + 1) * recipe.batch]


@lru_cache(maxsize=1)
def _order(rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def _stream(x: torch.Tensor, recipe: Training, start: int, device: str = "cpu") -> Iterator[torch.Tensor]:
    many = AHEAD if x.is_cuda else 1
    for step in count(start, many):
        rows = torch.stack([batch_rows(recipe, len(x), each) for each in range(step, step + many)]).to(x.device)
        for batch in rows:
            yield x[batch].to(device).float()


_NEAR: dict[tuple[str, int], torch.Tensor] = {}


def _near(x: torch.Tensor, stream: str, device: str) -> torch.Tensor:
    """Rows x of a stream on the GPU, where they take at most two thirds of its free memory; else as they are.

    They stay there for the process's next SAEs on the same stream.
    """
    if torch.device(device).type != "cuda":
        return x
    if (stream, len(x)) not in _NEAR:
        _NEAR.clear()
        gc.collect()  # a trainer and what it holds are a circle
        torch.cuda.empty_cache()
        if x.nbytes > torch.cuda.mem_get_info(device)[0] * 2 / 3:
            return x
        near = torch.empty_like(x, device=device)
        for there, here in zip(near.split(VALIDATION), x.split(VALIDATION), strict=True):
            there.copy_(here)
        _NEAR[stream, len(x)] = near
    return _NEAR[stream, len(x)]


def _folder(preset: Preset, stream: str, width: int, k: int, on: str = "") -> Path:
    """Where an SAE is put, by all that determines its weights."""
    how = {field: value for field, value in asdict(preset.training).items() if field not in OTHERS}
    key = cache.key(stream=stream, width=width, k=k, version=1, grid=None, **how)
    return cache.root() / "saes" / f"{name(preset, width, k, on)}-{key}"


def _train(preset: Preset, x: torch.Tensor, stream: str, width: int, k: int, on: str = "",
           about: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Train one SAE on rows x [n, d]; ``about`` goes into its record, ``on`` into its name."""
    if k > width:
        raise DarkmatterError(f"An SAE of {width} latents cannot have {k} of them active; give an L0 of at most its "
                              "width.")
    folder = _folder(preset, stream, width, k, on)
    with cache.lock(folder.name):
        if not (folder / "record.json").exists():
            work = folder.with_name(folder.name + ".work")
            trainer, began = _trainer(preset, x, stream, width, k, work), time.time()
            start, batches = trainer.n_training_samples, iter(trainer.data_provider)
            with progress.bar(batches, f"training {name(preset, width, k, on)}", "steps",
                              initial=trainer.n_training_steps, total=trainer.cfg.total_training_steps) as bar:
                trainer.data_provider = iter(bar)
                trainer.fit()
            record = _record(preset, x, stream, trainer, work)
            record |= {**about, "seconds": round(time.time() - began), "seconds_cover_tokens": record["tokens"] - start}
            with cache.atomic(folder) as temporary:
                trainer.sae.save_inference_model(temporary)
                (temporary / "record.json").write_text(json.dumps(record, indent=1))
    return folder


def early(preset: Preset, width: int, k: int, share: float) -> Path:
    """Directory of an SAE of the grid as it was after a share of its training, an eighth or a multiple of it.

    Its learning rate had not been lowered yet. Raises DarkmatterError where the SAE was not trained on this machine.
    """
    stream = activations.training(preset)
    folder = _folder(preset, stream.key, width, k)
    work = folder.with_name(folder.name + ".work")
    tokens = share * math.ceil(preset.training.tokens / preset.training.batch) * preset.training.batch
    near = min(work.glob("*/complete.json"), key=lambda path: abs(int(path.parent.name) - tokens), default=None)
    if near is None or abs(int(near.parent.name) - tokens) > tokens / 100 + preset.training.batch:
        raise DarkmatterError(f"There is no checkpoint of {folder.name} after {share:.0%} of its training here; train "
                              f"it on this machine: python -m darkmatter train --preset {preset.name}")
    early = folder.with_name(f"{name(preset, width, k)}-after-{near.parent.name}-{folder.name[-16:]}")
    with cache.lock(early.name):
        if not early.exists():
            sae = SparseTopKTrainingSAE.load_from_disk(near.parent)
            scaler = ActivationScaler()
            scaler.load(near.parent / ACTIVATION_SCALER_CFG_FILENAME)
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor or 1.0)
            with cache.atomic(early) as temporary:
                sae.save_inference_model(temporary)
    return early


def trained_rows(rows: int) -> int:
    """How many rows of a stream are trained on; the rest, its last, are those that FVU is watched on."""
    return rows - min(VALIDATION, rows // 8)


def _sides(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is trained on, and the last rows of the stream, float32, on which FVU is watched."""
    return x[:trained_rows(len(x))], x[trained_rows(len(x)):].float()


def _trainer(preset: Preset, x: torch.Tensor, stream: str, width: int, k: int, work: Path) -> Trainer:
    """A trainer at its newest complete checkpoint, or at the start."""
    recipe, device = preset.training, _device(preset)
    torch.manual_seed(recipe.seed * 1_000_003 + width * 131 + k)
    meta = SAEMetadata(model_name=preset.model, hook_name=preset.site, context_size=preset.context_length,
                       prepend_bos=preset.prepend_bos, model_dtype=model.dtype_of(preset))
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=width, k=k, device=device, dtype="float32", metadata=meta,
        normalize_activations="expected_average_only_in", decoder_init_norm=0.5))
    train, held = _sides(x)
    steps = math.ceil(recipe.tokens / recipe.batch)
    config = SAETrainerConfig(
        total_training_samples=steps * recipe.batch, train_batch_size_samples=recipe.batch,
        lr=recipe.lr * (4096 / width) ** 0.5, lr_end=0.0, lr_warm_up_steps=int(recipe.warmup * steps),
        lr_decay_steps=int(recipe.decay * steps), dead_feature_window=max(1, 200_000 // recipe.batch),
        n_checkpoints=CHECKPOINTS - 1, checkpoint_path=str(work), device=device,
        logger=LoggingConfig(log_to_wandb=False))
    trainer = Trainer(cfg=config, sae=sae, data_provider=iter(()))
    sample = train[:16 * recipe.batch].float()
    trainer.activation_scaler.scaling_factor = float(x.shape[1] ** 0.5 / sample.norm(dim=-1).mean())
    with torch.no_grad():  # start at the mean, so that no latent is spent on it
        sae.b_dec.copy_(sample.mean(0) * trainer.activation_scaler.scaling_factor)
    trainer.save_checkpoint_fn = lambda checkpoint_path: _checkpointed(trainer, held, checkpoint_path)
    _resume(trainer, work)
    trainer.data_provider = _stream(_near(train, stream, device), recipe, trainer.n_training_steps, device)
    return trainer


def _device(preset: Preset) -> str:
    """Where to train: MPS lacks the sparse sums."""
    device = model.device_of(preset)
    return "cpu" if device.type == "mps" else str(device)


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _checkpointed(trainer: SAETrainer, held: torch.Tensor, checkpoint_path: Path | None) -> None:
    """Called when a checkpoint is written: note FVU, mark it complete, drop the older ones' optimiser state."""
    assert checkpoint_path is not None
    done = {"tokens": trainer.n_training_samples, "fvu": _fvu(trainer, held), "dead": _dead(trainer)}
    cache.write_json(checkpoint_path / "complete.json", done)
    for older in checkpoint_path.parent.glob(f"*/{TRAINER_STATE_FILENAME}"):
        if older.parent != checkpoint_path:
            older.unlink()
    progress.say(f"{checkpoint_path.parent.name.removesuffix('.work')}: {done['tokens']:,} tokens, "
                 f"held-out FVU {done['fvu']:.4f}, dead {done['dead']:.1%}")


def _resume(trainer: SAETrainer, work: Path) -> None:
    whole = sorted(work.glob("*/complete.json"), key=lambda path: int(path.parent.name))
    if whole:
        trainer.load_trainer_state(whole[-1].parent)
        trainer.sae.load_weights_from_checkpoint(whole[-1].parent)
        done = trainer.n_training_samples
        trainer.n_training_steps = done // trainer.cfg.train_batch_size_samples
        trainer.checkpoint_thresholds = [at for at in trainer.checkpoint_thresholds if at >= done]


@torch.no_grad()
def _fvu(trainer: SAETrainer, held: torch.Tensor) -> float:
    scaled = trainer.activation_scaler(held.to(trainer.sae.device))
    missing = sum(float((part - trainer.sae(part)).pow(2).sum()) for part in scaled.split(1024))
    return missing / float((scaled - scaled.mean(0)).pow(2).sum())


def _dead(trainer: SAETrainer) -> float:
    return float(trainer.dead_neurons.float().mean())


def _record(preset: Preset, x: torch.Tensor, stream: str, trainer: SAETrainer, work: Path) -> dict[str, Any]:
    """How an SAE was trained, and its FVU at the end (the trainer's scale is folded into the SAE by then)."""
    curve = [json.loads(path.read_text()) for path in work.glob("*/complete.json")]
    recipe, (train, held) = preset.training, _sides(x)
    return {
        "model": preset.model, "site": preset.site, "width": trainer.sae.cfg.d_sae, "k": trainer.sae.cfg.k,
        "tokens": trainer.n_training_samples, "distinct_tokens": len(train),
        "epochs": trainer.n_training_samples / len(train), "fvu": _fvu(trainer, held),
        "seed": recipe.seed, "recipe": asdict(replace(recipe, grid=())), "lr": trainer.cfg.lr, "stream": stream,
        "curve": sorted(curve, key=lambda row: row["tokens"]), "dead_share": _dead(trainer),
        "hardware": _hardware(trainer.sae.device),
        "versions": {p: version(p) for p in ("torch", "sae-lens", "transformer-lens", "transformers")},
        "command": "python -m darkmatter train --preset " + preset.name,
    }
