"""What a survey will need before it starts: download, disk, memory and time, here or on a named GPU.

Every number is a formula of ``sizes``, so that no hub is needed. ``Need`` holds what the tests check against measured
runs.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from . import cache, model
from .errors import DarkmatterError
from .preset import Preset
from .sizes import Sae, Shape, sae_of, shape_of

PROCESS = 1.6e9  # bytes of a process with its libraries
DENSE = 2**23  # dense latents in memory at once, about


@dataclass(frozen=True)
class Device:
    """What a datasheet says: memory in bytes, bytes and operations a second (dense bfloat16, and plain float32)."""

    memory: float
    bandwidth: float
    half: float
    single: float


GPUS = {
    "h200": Device(141e9, 4.8e12, 989e12, 67e12), "h100": Device(80e9, 3.35e12, 989e12, 67e12),
    "a100": Device(80e9, 2.04e12, 312e12, 19.5e12), "a100-40": Device(40e9, 1.56e12, 312e12, 19.5e12),
    "l40s": Device(48e9, 0.86e12, 362e12, 91.6e12), "l4": Device(24e9, 0.3e12, 121e12, 30.3e12),
    "rtx-4090": Device(24e9, 1.01e12, 165e12, 82.6e12), "t4": Device(16e9, 0.32e12, 65e12, 8.1e12),
}
METRICS = 12  # of the survey, whose bootstrap draws are kept
REACHED = 0.4
"""Share of a peak that real work reaches; a rough figure."""


@dataclass(frozen=True)
class Need:
    """What the survey of a preset's SAEs takes, in bytes and operations."""

    preset: Preset
    shape: Shape
    saes: tuple[Sae, ...]

    @property
    def d(self) -> int:
        return self.shape.width(self.preset.site)

    @property
    def read(self) -> int:
        """Tokens read."""
        return self.preset.contexts * self.preset.context_length

    @property
    def kept(self) -> int:
        """Tokens kept, at most."""
        return self.preset.contexts * len(self.preset.kept)

    @property
    def download(self) -> float:
        """Weights of the model, and of the SAEs that are not here yet."""
        return self.shape.parameters * self.shape.bytes + sum(each.bytes * each.weights for each in self.saes)

    @property
    def kept_on_disk(self) -> float:
        """Activations of the site and of the preset's others, and for each SAE codes, a table of tokens, and draws."""
        sites = {self.preset.site, *self.preset.elsewhere}
        activations = 2 * self.kept * sum(self.shape.width(site) for site in sites)
        draws = 8 * METRICS * (1 + self.preset.bootstrap)
        return activations + sum(self.kept * (8 * each.l0 + 8 + 28 + 1) + draws for each in self.saes)

    @property
    def forward_memory(self) -> float:
        """Model and one batch in a forward pass: the stream, an MLP's insides, attention's scores where written out."""
        half, length = torch.finfo(getattr(torch, model.dtype_of(self.preset))).bits // 8, self.preset.context_length
        tokens = min(self.preset.batch_contexts, self.preset.contexts) * length
        scores = 3 * 4 * tokens * length * self.shape.heads if self.shape.eager else 0
        return half * (self.shape.parameters + tokens * (6 * self.shape.d + 3 * self.shape.ff)) + scores

    @property
    def survey_memory(self) -> float:
        """All SAEs in float32, their moments in float64, and a batch of dense latents."""
        widest = max((each.width for each in self.saes), default=0)
        held = 4 * sum(each.weights for each in self.saes) + 8 * self.d**2 * (3 + 2 * len(self.saes))
        return held + 3 * 4 * max(widest, DENSE)

    @property
    def host_memory(self) -> float:
        """On a GPU's host: the weights as they are read, and the SAEs on their way."""
        model_size = self.shape.parameters * 2
        return PROCESS + max(model_size, 4 * sum(each.weights for each in self.saes))

    @property
    def forward(self) -> float:
        """Operations of the forward pass, as far as the last site."""
        layers = 1 + max(model.layer_of(site) for site in (self.preset.site, *self.preset.elsewhere))
        return self.read * self.shape.forward(min(layers, self.shape.layers), self.preset.context_length)

    @property
    def survey(self) -> float:
        """Operations of the encoders, the moments and the maps, in float32."""
        products = 2 * self.d**2 * (1 + 2 * len(self.saes))
        return self.kept * (sum(2 * self.d * each.width for each in self.saes) + products)

    @property
    def moved(self) -> float:
        """Bytes through memory: dense latents written and read, decoder rows gathered in two passes."""
        return self.kept * sum(12 * each.width + 2 * 4 * self.d * each.l0 for each in self.saes)

    def seconds(self, device: Device) -> float:
        """Time on a device, at the share of its peaks that is reached in practice."""
        survey = max(self.survey / device.single, self.moved / device.bandwidth)
        return (self.forward / device.half + survey) / REACHED


def of(preset: Preset) -> Need:
    """The need of a preset. Raises DarkmatterError when the model's sizes cannot be known here."""
    shape = shape_of(preset)
    return Need(preset, shape, tuple(sae_of(ref, preset, shape) for ref in preset.saes))


def lines(preset: Preset, gpu: str = "") -> Iterator[str]:
    """The plan, a line at a time, on this machine or on a GPU of the table.

    Raises DarkmatterError for a GPU that is not in the table, and when the model's sizes cannot be known.
    """
    if gpu and gpu not in GPUS:
        raise DarkmatterError(f"There is no datasheet for the GPU '{gpu}'; there are {', '.join(GPUS)}.")
    if gpu and preset.dtype == "auto":
        preset = dataclasses.replace(preset, dtype="bfloat16")
    need = of(preset)
    fit = round(need.kept * preset.fit_share)
    yield f"text      {preset.contexts:,} contexts of {preset.context_length:,}: {need.read:,} tokens read"
    yield f"kept      {need.kept:,} tokens at most, about {fit:,} to fit and {need.kept - fit:,} to score"
    yield f"download  {_size(need.download)}: a model of {need.shape.parameters / 1e9:.2f} billion weights, " \
          f"{len(need.saes)} SAEs of {sum(each.width for each in need.saes):,} latents in all"
    yield f"disk      {_size(need.kept_on_disk)} of activations, codes and tables, beside what is downloaded"
    on = GPUS.get(gpu) or here(preset)
    where = f"on one {gpu}" if gpu else "here"
    if gpu or model.device_of(preset).type == "cuda":
        survey = need.survey_memory
        yield f"gpu       {_size(need.forward_memory)} for the forward pass, {_size(survey)} for the survey"
        yield f"memory    {_size(need.host_memory)} on the host"
    else:
        yield f"memory    {_size(PROCESS + max(need.forward_memory, need.survey_memory))} at the peak"
    yield f"time      about {_time(need.seconds(on))} {where} to survey {len(need.saes)} SAEs"
    yield from troubles(need, on.memory, gpu)


def troubles(need: Need, most: float, gpu: str = "") -> Iterator[str]:
    """What does not fit, and which setting would make it fit; nothing where all fits. ``most``: the device's memory."""
    preset, free, host = need.preset, shutil.disk_usage(cache.root()).free, psutil.virtual_memory().total
    apart = bool(gpu) or model.device_of(preset).type == "cuda"
    own, where = 0 if apart else PROCESS, f"the {gpu}" if gpu else "this machine"
    if need.forward_memory + own > most:
        smaller = "a smaller model, or a machine with more memory"
        if model.dtype_of(preset) == "float32":
            smaller = "dtype: bfloat16"
        if preset.batch_contexts > 1:
            smaller = f"batch_contexts: 1 (now {preset.batch_contexts})"
        yield f"too much  the forward pass does not fit {where}'s {_size(most)}: set or take {smaller}"
    if need.survey_memory + own > most:
        yield f"too much  all SAEs at once do not fit {where}'s {_size(most)}: {_fewer(need, most - own)}"
    if not gpu and (disk := need.kept_on_disk + need.download) > free:
        fewer = int(0.9 * preset.contexts * (free - need.download) / need.kept_on_disk)
        yield (f"too much  {_size(disk)} do not fit the {_size(free)} of disk that are free: set DARKMATTER_CACHE and "
               f"HF_HOME to a larger one{f', or contexts: {fewer}' if fewer > 1 else ''}")
    if apart and not gpu and need.host_memory > host:
        yield f"too much  model and SAEs do not fit the host's {_size(host)}: {_fewer(need, host - PROCESS)}"


def warn(preset: Preset) -> None:
    """Warn, before a run starts, of what will not fit this machine; silent where the model's sizes are not known."""
    try:
        found = list(troubles(of(preset), memory(preset)))
    except DarkmatterError:  # the run itself will say what is wrong with the model
        return
    for sentence in found:
        warnings.warn(f"THIS RUN WILL PROBABLY NOT FIT: {sentence.removeprefix('too much').strip()}", stacklevel=3)


def _fewer(need: Need, most: float) -> str:
    """Words for how many of the SAEs fit together."""
    sizes, taken, fits = sorted(4 * each.weights + 16 * need.d**2 for each in need.saes), 24.0 * need.d**2 + 4e8, 0
    for size in sizes:
        taken += size
        fits += taken <= most
    return f"give the {fits} smallest of them, and the others one at a time, with -p sae" if fits else \
        "the smallest of them alone is too large; give a narrower one with -p sae"


def memory(preset: Preset) -> float:
    """Bytes of memory where the preset runs."""
    device = model.device_of(preset)
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
        psutil.virtual_memory().total


def here(preset: Preset) -> Device:
    """This machine: its memory, and its speed at one product in the model's type and one in float32, measured now."""
    device = model.device_of(preset)
    half, single = (_speed(device, dtype) for dtype in (getattr(torch, model.dtype_of(preset)), torch.float32))
    return Device(memory(preset), 2e12 if device.type == "cuda" else 2e10, half, single)


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(1024, 1024, dtype=dtype, device=device)
    float((a @ a)[0, 0])
    begun = time.perf_counter()
    for _ in range(4):
        float((a @ a)[0, 0])
    return 4 * 2 * 1024**3 / (time.perf_counter() - begun)


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes" if minutes >= 1.5 else \
        f"{max(1, seconds):.0f} seconds"
