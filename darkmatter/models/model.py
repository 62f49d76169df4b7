"""Read activations out of a language model and write them back, by TransformerLens's hook names.

The model runs as transformers runs it, its weights unprocessed, so that an SAE sees the activations
that it was trained on.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange

from .. import cache
from ..errors import DarkmatterError
from ..inputs import present
from . import packaged, precision

if TYPE_CHECKING:
    from ..presets import Preset

# Hooks that TransformerLens lists, and fires only where a setting of its own asks for them.
UNSET = ("hook_attn_in", "hook_mlp_in", "_input")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what the book needs to know of it."""

    bridge: Any
    """TransformerLens's ``TransformerBridge``, in evaluation mode."""
    tokenizer: Any
    """The tokenizer of transformers."""
    n_layers: int
    d_model: int


# ---- opening a model ----

def device_of(preset: Preset) -> torch.device:
    """The preset's device; 'auto' is the first there is of cuda, mps and cpu."""
    if preset.device != "auto":
        return torch.device(preset.device)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return torch.device("cuda" if cuda else "mps" if mps else "cpu")


def dtype_of(preset: Preset) -> str:
    """The type that the preset's model runs in, by name; 'auto' is the fast one on its device."""
    if preset.dtype != "auto":
        return preset.dtype
    return str(precision.fast(device_of(preset))).removeprefix("torch.")


def _require_device(device: torch.device) -> None:
    """Raise DarkmatterError where this machine has no such device."""
    count = torch.cuda.device_count()
    here = {"cuda": (device.index or 0) < count, "mps": torch.backends.mps.is_available()}
    if not here.get(device.type, True):
        raise DarkmatterError(f"The preset asks for the device '{device}', which this machine does "
                              "not have; say device: auto, or cpu.")


def _warn_if_slow(preset: Preset) -> None:
    """Say what bfloat16 costs where a preset names it and the processor has no kernel for it."""
    device = device_of(preset)
    if preset.dtype == "bfloat16" and precision.fast(device) != torch.bfloat16:
        warnings.warn("The preset asks for bfloat16, in which this processor needs "
                      f"{precision.ratio():.1f} times as long as in float32; dtype: auto takes the "
                      "faster of the two.", stacklevel=3)


def directory(preset: Preset) -> str:
    """What ``from_pretrained`` is given: a directory (made once for a packaged model) or hub id."""
    if preset.model in packaged.MODELS:
        return str(packaged.directory(preset.model))
    return preset.model


def identity(preset: Preset) -> dict[str, str]:
    """What stands in the keys of all that a model gave: its name, and of a directory its files."""
    files = {}
    if preset.model not in packaged.MODELS and Path(preset.model).is_dir():
        files = {"files": cache.fingerprint(Path(preset.model))}
    return {"model": preset.model, **files}


def opened(preset: Preset, opener: Callable[..., Any], **options: Any) -> Any:
    """What ``opener``, one of transformers' or TransformerLens's, makes of the preset's model.

    Raises DarkmatterError, with the loader's reason, where it cannot.
    """
    name = directory(preset)
    try:
        return opener(name, **options)
    except Exception as error:  # the loaders raise many kinds, safetensors its own
        if Path(name).is_dir():
            for file in filter(Path.is_file, Path(name).iterdir()):
                present(file)  # a pointer of git-lfs is told as one
        reason = " ".join(str(error).split())[:300]
        names = ", ".join(f"'{built_in}'" for built_in in packaged.MODELS)
        raise DarkmatterError(
            f"The model '{preset.model}' cannot be opened; give {names}, a model directory, or a "
            f"hub id with access to the hub. The loader said: {reason}") from error


def load_tokenizer(preset: Preset) -> Any:
    """The model's tokenizer alone."""
    from transformers import AutoTokenizer

    return opened(preset, AutoTokenizer.from_pretrained)


def load(preset: Preset) -> LoadedModel:
    """Open the preset's model through TransformerLens, on its device and in its type.

    Raises DarkmatterError when the model cannot be opened, has no such site as the preset's, or the
    machine has no such device.
    """
    from transformer_lens.model_bridge import TransformerBridge

    device = device_of(preset)
    _require_device(device)
    _warn_if_slow(preset)
    with _whole_weights(preset):
        bridge = opened(preset, TransformerBridge.boot_transformers, device=str(device),
                        dtype=getattr(torch, dtype_of(preset)))
    bridge.eval()
    tokenizer = load_tokenizer(preset)
    _fuse_attention(bridge)
    loaded = LoadedModel(bridge, tokenizer, bridge.cfg.n_layers, bridge.cfg.d_model)
    check_site(loaded, preset.site)
    return loaded


@contextmanager
def _whole_weights(preset: Preset) -> Iterator[None]:
    """Look at how transformers loads a model meanwhile: it fills what is missing with noise.

    Raises DarkmatterError where a weight is missing from the files or of another shape, and warns
    of weights that nothing takes.
    """
    from transformers import PreTrainedModel

    finish, loads = PreTrainedModel._finalize_model_loading, list[Any]()

    def seen(*arguments: Any) -> Any:
        loads.append(finish(*arguments))
        return loads[-1]

    setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(seen))  # noqa: B010
    try:
        yield
    finally:
        setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(finish))  # noqa: B010
    for load in loads:
        lacking, extra = sorted(load.missing_and_mismatched()), sorted(load.unexpected_keys)
        left = f" Its files have {extra[0]} instead." if extra else ""
        if lacking:
            raise DarkmatterError(
                f"The weights of the model '{preset.model}' do not fit it: {len(lacking)} are "
                f"missing or of another shape, such as {lacking[0]}.{left} A model that "
                "torch.compile has wrapped must be saved without the wrapping.")
        if extra:
            warnings.warn(f"The files of the model '{preset.model}' hold {len(extra)} weights that "
                          f"it has no use for, such as {extra[0]}.", stacklevel=4)


def _fuse_attention(bridge: Any) -> None:
    """Let attention blocks run transformers' fused kernel, not the bridge's step-by-step one.

    Twice as fast on a CPU at 1,024 positions. All hooks fire but those on scores, patterns and
    rotated queries and keys, which this book does not read; soft-capped scores (Gemma 2) have no
    fused form and stay as they are.
    """
    if getattr(bridge.original_model.config, "attn_logit_softcapping", None):
        return
    bridge.original_model.set_attn_implementation("sdpa")
    for block in bridge.blocks:
        if hasattr(block.attn, "original_component") and hasattr(block.attn, "hook_in"):
            _route_output(block.attn)
            # A plain setattr would go to the original component.
            object.__setattr__(block.attn, "forward", _fused(block.attn))


def _route_output(attention: Any) -> None:
    """Make the original's output map the bridge's, so that hook_z fires (GPT-2's is another)."""
    bare = getattr(getattr(attention, "o", None), "original_component", None)
    for name, part in list(attention.original_component.named_children()):
        if part is bare:
            setattr(attention.original_component, name, attention.o)


def _fused(attention: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs["hidden_states"] = attention.hook_in(kwargs.get("hidden_states", *args[:1]))
        output = attention.original_component(**kwargs)
        return (attention.hook_out(output[0]), *output[1:])

    return forward


# ---- sites ----

def layer_of(site: str) -> int:
    """The layer in a hook name such as 'blocks.15.hook_resid_post'."""
    match = re.match(r"blocks\.(\d+)\.", site)
    if not match:
        raise DarkmatterError(f"'{site}' is not a site inside a layer; give one as "
                              "'blocks.15.hook_resid_post'.")
    return int(match[1])


def check_site(model: LoadedModel, site: str) -> None:
    """Raise DarkmatterError when the model has no such hook."""
    layer = layer_of(site)
    if layer >= model.n_layers:
        raise DarkmatterError(f"The model has layers 0 to {model.n_layers - 1}, and the site "
                              f"'{site}' asks for layer {layer}.")
    if site not in model.bridge.hook_dict:
        names = [name.split(".", 2)[2] for name in model.bridge.hook_dict
                 if name.startswith(f"blocks.{layer}.hook_") and not name.endswith(UNSET)]
        raise DarkmatterError(f"The model has no site '{site}'; in a layer there are "
                              f"{', '.join(sorted(names))}.")


def check_limits(model: LoadedModel, tokens: np.ndarray, sites: Sequence[str]) -> None:
    """Try two short contexts, before a long pass, at every site.

    Raises DarkmatterError where contexts are longer than the model's positions, tokens are not in
    its vocabulary, or a site gives no finite vector a token.
    """
    original = model.bridge.original_model
    positions = getattr(original.config, "max_position_embeddings", None)
    if positions and tokens.shape[1] > positions:
        raise DarkmatterError(f"The model has {positions:,} positions, and the contexts have "
                              f"{tokens.shape[1]:,} tokens; give a context_length of at most that.")
    rows = original.get_input_embeddings().weight.shape[0]
    if tokens.max() >= rows:
        raise DarkmatterError(f"The text has the token {tokens.max():,}, and the model knows "
                              f"{rows:,}: the tokenizer is another model's.")
    try:
        captured = capture(model, tokens[:2, :16], sites)
    except ValueError as error:  # TransformerLens, of hooks that need a setting of their own
        raise DarkmatterError(f"The sites {', '.join(sites)} cannot be read: "
                              f"{' '.join(str(error).split())[:200]}") from error
    for site in sites:
        x = captured.get(site)
        if x is None or x.ndim != 3:
            raise DarkmatterError(f"The site '{site}' gives no vector a token in the fused forward "
                                  "pass that is used here; take hook_resid_post, hook_mlp_out or "
                                  "attn.hook_z of a layer.")
        if not x.isfinite().all():
            raise DarkmatterError(f"The activations at '{site}' are not finite in {x.dtype}; say "
                                  "dtype: bfloat16 or float32.")


# ---- what a forward pass gives ----

@torch.inference_mode()
def capture(model: LoadedModel, tokens: np.ndarray, sites: Sequence[str]
            ) -> dict[str, torch.Tensor]:
    """Activations [context, position, d] at each of ``sites``, in the model's type.

    ``tokens``: int [context, position]. One forward pass reads all sites and stops after the last
    of their layers. An attention site's heads are joined: d = head · d_head.
    Raises DarkmatterError when the model has no such site.
    """
    for site in sites:
        check_site(model, site)
    captured: dict[str, torch.Tensor] = {}

    def reader(site: str) -> Callable[..., None]:
        def read(value: torch.Tensor, hook: Any) -> None:
            if value.ndim == 4:
                value = rearrange(value, "context position head d -> context position (head d)")
            captured[site] = value

        return read

    model.bridge.run_with_hooks(
        token_ids(model, tokens), fwd_hooks=[(site, reader(site)) for site in sites],
        stop_at_layer=1 + max(map(layer_of, sites)), return_type=None)
    return captured


@torch.inference_mode()
def losses(model: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """Next-token cross entropy in nats, float32 [context, position - 1], context by context."""
    rows = []
    for context in token_ids(model, tokens):
        logits = model.bridge(context[None], return_type="logits")[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, context[1:], reduction="none")
        rows.append(loss.cpu())
    return torch.stack(rows).numpy()


def kept(tokenizer: Any, tokens: np.ndarray, first: int) -> np.ndarray:
    """bool [context, position]: from ``first`` to the last but one, but no special token's id."""
    positions = np.arange(tokens.shape[1])
    inside = (positions >= first) & (positions < tokens.shape[1] - 1)
    return inside[None] & ~np.isin(tokens, tokenizer.all_special_ids)


def token_ids(model: LoadedModel, tokens: np.ndarray) -> torch.Tensor:
    """The tokens as int64, on the model's device."""
    device = next(model.bridge.original_model.parameters()).device
    return torch.as_tensor(tokens, dtype=torch.long, device=device)
