"""What a survey will need before it starts: download, disk, memory, time, here or on a named GPU.

Formulas of sizes that are published, in a configuration, or in a name: no hub is needed. The tests
hold them against counted weights and operations, and against what a run leaves on disk.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from . import cache
from .errors import DarkmatterError
from .models import model
from .presets import Preset, releases

PROCESS = 1.6e9  # bytes of a process with its libraries
DENSE = 2**23  # dense latents in memory at once, about
METRICS = 12  # of the survey, whose bootstrap draws are kept
CODED = 100  # active latents a token, where an SAE's name does not tell
REACHED = 0.4  # share of a device's peak that real work reaches, roughly
GPUS = {  # the datasheets' bytes of memory, operations a second in dense bfloat16 and in float32
    "h200": (141e9, 989e12, 67e12), "h100": (80e9, 989e12, 67e12), "a100": (80e9, 312e12, 19.5e12),
    "a100-40": (40e9, 312e12, 19.5e12), "l40s": (48e9, 362e12, 91.6e12),
    "l4": (24e9, 121e12, 30.3e12), "rtx-4090": (24e9, 165e12, 82.6e12), "t4": (16e9, 65e12, 8.1e12)}

# A decoder-only model: layers, d_model, dimensions of hook_z (attention's heads joined), weights of
# one layer and in all, and bytes of a weight as it is downloaded.
Shape = namedtuple("Shape", "layers d z layer parameters bytes")
SHAPES = {  # as published with the models
    "google/gemma-2-2b": Shape(26, 2304, 2048, 77_865_984, 2_614_341_888, 2),
    "google/gemma-2-9b": Shape(42, 3584, 4096, 198_195_200, 9_241_705_984, 2),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 4096, 218_112_000, 8_030_261_248, 2),
    "gpt2": Shape(12, 768, 768, 7_087_872, 124_439_808, 4),
    "google/gemma-3-270m": Shape(18, 640, 1024, 5_573_632, 268_098_176, 2),
    "google/gemma-3-1b-pt": Shape(26, 1152, 1024, 26_842_112, 999_885_952, 2),
    "gemma-3-270m-q4": Shape(18, 640, 1024, 5_573_632, 268_098_176, 1),
    "smollm2": Shape(30, 576, 576, 3_540_096, 134_515_008, 1)}
# An SAE: latents, those active on a token, and bytes of a weight to download, 0 where it is here.
Sae = namedtuple("Sae", "width l0 bytes")
# Bytes, and operations: of the forward pass to the last site, and of the survey, in float32.
Need = namedtuple("Need", "download disk forward_memory survey_memory forward survey")


def shape_of(preset: Preset) -> Shape:
    """A model's sizes: of a published model from the table, of another from its configuration."""
    if preset.model in SHAPES:
        return SHAPES[preset.model]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = model.opened(preset, AutoConfig.from_pretrained)
    config = getattr(config, "text_config", None) or config
    with torch.device("meta"):  # its shapes alone: they take neither memory nor time
        made = AutoModelForCausalLM.from_config(config)
    counts = {name: weight.numel() for name, weight in made.named_parameters()}
    in_layers = sum(count for name, count in counts.items() if re.search(r"\.\d+\.", name))
    layers, d, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    z = heads * (getattr(config, "head_dim", None) or d // heads)
    return Shape(layers, d, z, in_layers // layers, sum(counts.values()), 2)


def sae_of(ref: str, d: int) -> Sae:
    """An SAE's sizes: by its directory's cfg.json, else by its name; 16,384 where neither tells."""
    kind, _, rest = ref.partition(":")
    path = Path(ref if Path(ref).is_dir() else rest).expanduser() / "cfg.json"
    if path.exists():
        cfg = json.loads(path.read_text())
        width = cfg.get("d_sae") or cfg.get("num_latents")
        return Sae(int(width or cfg["d_in"] * cfg.get("expansion_factor", 16)),
                   float(cfg.get("k") or CODED), 0)
    if sizes := re.search(r"(?:train:|-w)(\d+)(?:x|-k)(\d+)", ref):
        return Sae(int(sizes[1]), float(sizes[2]), 0)
    _, name, l0 = releases.read_id(rest, {})
    width = (releases.size(name) or 16_384) * (d if name.endswith("x") else 1)
    return Sae(width, l0 or CODED, 2 if "llama_scope" in kind else 4)


def needed(preset: Preset, shape: Shape, most: int | None = None) -> Need:
    """What the survey of the preset's SAEs takes, or of the ``most`` smallest of them."""
    widths = {site: shape.z if site.endswith("hook_z") else shape.d
              for site in (preset.site, *preset.elsewhere)}
    d, kept, length = widths[preset.site], preset.contexts * len(preset.kept), preset.context_length
    saes = sorted(sae_of(ref, d) for ref in preset.saes)[:most]
    weights = [2 * d * sae.width for sae in saes]
    download = shape.parameters * shape.bytes + sum(
        sae.bytes * weight for sae, weight in zip(saes, weights, strict=True))
    # Kept on disk: activations in bfloat16; for each SAE codes, a table of tokens, and draws.
    disk = 2 * kept * sum(widths.values()) + sum(
        kept * (8 * sae.l0 + 37) + 8 * METRICS * (1 + preset.bootstrap) for sae in saes)
    # In memory at once: the model, and for one batch what a layer has between its maps.
    size = torch.finfo(getattr(torch, model.dtype_of(preset))).bits // 8
    batch = min(preset.batch_contexts, preset.contexts) * length
    forward_memory = size * (shape.parameters + 20 * batch * shape.d)
    # Afterwards: all SAEs in float32, their moments in float64, and a block of dense latents.
    block = max(DENSE, saes[-1].width)
    survey_memory = 4 * sum(weights) + 8 * d**2 * (3 + 2 * len(saes)) + 12 * block
    # The forward pass reads every token; encoders, moments and maps see those that are kept.
    layers = min(shape.layers, 1 + max(map(model.layer_of, widths)))
    forward = preset.contexts * length * layers * (2 * shape.layer + 4 * length * shape.z)
    survey = kept * (sum(weights) + 2 * d**2 * (1 + 2 * len(saes)))
    return Need(download, disk, forward_memory, survey_memory, forward, survey)


def lines(preset: Preset, gpu: str = "") -> Iterator[str]:
    """The plan, a line at a time, on this machine or on a GPU of the table.

    Raises DarkmatterError for another GPU, and where the model cannot be opened.
    """
    if gpu and gpu not in GPUS:
        known = ", ".join(GPUS)
        raise DarkmatterError(f"There is no datasheet for the GPU '{gpu}'; there are {known}.")
    if gpu and preset.dtype == "auto":
        preset = replace(preset, dtype="bfloat16")
    shape, kept = shape_of(preset), preset.contexts * len(preset.kept)
    need, saes, where = needed(preset, shape), len(preset.saes), f"on one {gpu}" if gpu else "here"
    memory, half, single = GPUS[gpu] if gpu else (_memory(preset), *_speeds(preset))
    minutes = (need.forward / half + need.survey / single) / REACHED / 60
    spent = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, minutes):.0f} minutes"
    yield (f"text      {preset.contexts * preset.context_length:,} tokens read, {kept:,} kept at "
           f"most: about {kept * preset.fit_share:,.0f} to fit, the others to score")
    yield (f"download  {_size(need.download)}: a model of {shape.parameters / 1e9:.2f} billion "
           f"weights, and {saes} SAEs as far as they are not here")
    yield f"disk      {_size(need.disk)} of activations, codes and tables, beside the download"
    yield (f"memory    {_size(need.forward_memory)} for the forward pass, then "
           f"{_size(need.survey_memory)} for the survey, {where}; {_size(PROCESS)} of host besides")
    yield f"time      about {spent} {where} to survey {saes} SAEs"
    yield from (f"too much  {trouble}" for trouble in troubles(preset, memory, gpu))


def troubles(preset: Preset, memory: float, gpu: str = "") -> Iterator[str]:
    """What does not fit, and what would; ``memory``: bytes of the device."""
    shape, device = shape_of(preset), f"{f'the {gpu}' if gpu else 'this machine'}'s {_size(memory)}"
    room = memory if gpu or model.device_of(preset).type == "cuda" else memory - PROCESS
    need = needed(preset, shape)
    if need.forward_memory > room:
        remedy = (f"batch_contexts: 1 (now {preset.batch_contexts})" if preset.batch_contexts > 1
                  else "dtype: bfloat16, or a smaller model")
        yield f"the forward pass does not fit {device}: set or take {remedy}"
    if need.survey_memory > room:
        counts = range(1, len(preset.saes))
        fits = sum(needed(preset, shape, n).survey_memory <= room for n in counts)
        remedy = f"the {fits} smallest, the others one at a time," if fits else "a narrower one"
        yield f"all SAEs at once do not fit {device}: give {remedy} with -p sae"
    free = shutil.disk_usage(cache.root()).free
    if not gpu and need.disk + need.download > free:
        contexts = int(0.9 * preset.contexts * max(0, free - need.download) / need.disk)
        fewer = f", or contexts: {contexts}" if contexts > 1 else ""
        yield (f"{_size(need.disk + need.download)} do not fit the {_size(free)} of free disk: set "
               f"DARKMATTER_CACHE and HF_HOME to a larger one{fewer}")


def warn(preset: Preset) -> None:
    """Warn, before a run starts, of what will not fit this machine; an advisory ends no run."""
    try:
        sentences = list(troubles(preset, _memory(preset)))
    except Exception:  # what cannot be read here, the run itself will name
        return
    for sentence in sentences:
        warnings.warn(f"THIS RUN WILL PROBABLY NOT FIT: {sentence}", stacklevel=3)


def _memory(preset: Preset) -> float:
    """Bytes of memory of the device that the preset runs on."""
    device = model.device_of(preset)
    cuda = device.type == "cuda" and torch.cuda.get_device_properties(device)
    return cuda.total_memory if cuda else psutil.virtual_memory().total


def _speeds(preset: Preset) -> Iterator[float]:
    """Operations a second in the model's type and in float32, from a product of each, now."""
    for dtype in (getattr(torch, model.dtype_of(preset)), torch.float32):
        a, begun = torch.ones(1024, 1024, dtype=dtype, device=model.device_of(preset)), 0.0
        for _ in range(2):  # the first sets the device up
            begun = time.perf_counter()
            float((a @ a)[0, 0])
        yield 2 * 1024**3 / (time.perf_counter() - begun)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
