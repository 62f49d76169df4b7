"""Read activations out of a language model and write them back, through TransformerLens's hook names.

The model runs as transformers runs it: no weight processing, so that an SAE sees the activations it was trained on.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange

from . import packaged, precision
from .errors import DarkmatterError
from .preset import Preset

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


def device_of(preset: Preset) -> torch.device:
    """The preset's device; 'auto' is the first there is of cuda, mps and cpu."""
    if preset.device != "auto":
        return torch.device(preset.device)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return torch.device("cuda" if cuda else "mps" if mps else "cpu")


def dtype_of(preset: Preset) -> str:
    """The name of the type that the preset's model runs in; 'auto' is the fast one on its device."""
    if preset.dtype != "auto":
        return preset.dtype
    return str(precision.fast(device_of(preset))).removeprefix("torch.")


def _require_device(device: torch.device) -> None:
    """Raise DarkmatterError where this machine has no such device."""
    count = torch.cuda.device_count()
    here = {"cuda": (device.index or 0) < count, "mps": torch.backends.mps.is_available()}
    if not here.get(device.type, True):
        raise DarkmatterError(f"The preset asks for the device '{device}', which this machine does not have; say "
                              "device: auto, or cpu.")


def _warn_if_slow(preset: Preset) -> None:
    """Say what bfloat16 costs where it is asked for by name and the processor has no kernel for it."""
    device = device_of(preset)
    if preset.dtype == "bfloat16" and precision.fast(device) != torch.bfloat16:
        warnings.warn(f"The preset asks for bfloat16, in which this processor needs {precision.ratio():.1f} times as "
                      "long as in float32; dtype: auto takes the faster of the two.", stacklevel=3)


def directory(preset: Preset) -> str:
    """What ``from_pretrained`` is given: a local directory (made once for a packaged model) or a hub id."""
    return str(packaged.directory(preset.model)) if preset.model in packaged.MODELS else preset.model


def load_tokenizer(preset: Preset) -> Any:
    """The model's tokenizer alone."""
    from transformers import AutoTokenizer

    return opened(preset, AutoTokenizer.from_pretrained)


def load(preset: Preset) -> LoadedModel:
    """Open the preset's model through TransformerLens, on its device and in its dtype (``dtype_of``).

    Raises DarkmatterError when the model cannot be opened, or has no such site, or the machine no such device.
    """
    from transformer_lens.model_bridge import TransformerBridge

    _require_device(device_of(preset))
    _warn_if_slow(preset)
    bridge = opened(preset, TransformerBridge.boot_transformers, device=str(device_of(preset)),
                    dtype=getattr(torch, dtype_of(preset)))
    bridge.eval()
    tokenizer = load_tokenizer(preset)
    _fuse_attention(bridge)
    loaded = LoadedModel(bridge, tokenizer, bridge.cfg.n_layers, bridge.cfg.d_model)
    check_site(loaded, preset.site)
    return loaded


def opened(preset: Preset, opener: Callable[..., Any], **options: Any) -> Any:
    name = directory(preset)
    try:
        return opener(name, **options)
    except Exception as error:  # the loaders raise many kinds, safetensors its own
        reason = " ".join(str(error).split())[:300]
        names = ", ".join(f"'{built_in}'" for built_in in packaged.MODELS)
        raise DarkmatterError(f"The model '{preset.model}' cannot be opened; give {names}, a model directory, "
                              f"or a hub id with access to the hub. The loader said: {reason}") from error


def _fuse_attention(bridge: Any) -> None:
    """Let every attention block run transformers' fused kernel instead of the bridge's step-by-step one.

    Twice as fast on a CPU at 1,024 positions. All hooks fire but those on scores, patterns and rotated queries and
    keys, which this book does not read; soft-capped scores (Gemma 2) have no fused form and stay as they are.
    """
    if getattr(bridge.original_model.config, "attn_logit_softcapping", None):
        return
    bridge.original_model.set_attn_implementation("sdpa")
    for block in bridge.blocks:
        if hasattr(block.attn, "original_component") and hasattr(block.attn, "hook_in"):
            _route_output(block.attn)
            object.__setattr__(block.attn, "forward", _fused(block.attn))  # plain setattr goes to the original


def _route_output(attention: Any) -> None:
    """Let the original block's output map be the bridge's (GPT-2's is not by itself), so that hook_z fires."""
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


def layer_of(site: str) -> int:
    """The layer in a hook name such as 'blocks.15.hook_resid_post'."""
    found = re.match(r"blocks\.(\d+)\.", site)
    if not found:
        raise DarkmatterError(f"'{site}' is not a site inside a layer; give one as 'blocks.15.hook_resid_post'.")
    return int(found[1])


def check_site(model: LoadedModel, site: str) -> None:
    """Raise DarkmatterError when the model has no such hook."""
    layer = layer_of(site)
    if layer >= model.n_layers:
        raise DarkmatterError(f"The model has layers 0 to {model.n_layers - 1}, and the site '{site}' asks for layer "
                              f"{layer}.")
    if site not in model.bridge.hook_dict:
        known = [name.split(".", 2)[2] for name in model.bridge.hook_dict if name.startswith(f"blocks.{layer}.hook_")]
        raise DarkmatterError(f"The model has no site '{site}'; in a layer there are {', '.join(sorted(known))}.")


@torch.inference_mode()
def capture(model: LoadedModel, tokens: np.ndarray, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    """Activations at ``sites`` for ``tokens`` [context, position]: {site: [context, position, d]}, the model's dtype.

    One forward pass that stops after the last of the layers. An attention site's heads are joined: d = head · d_head.
    Raises DarkmatterError when the model has no such site.
    """
    for site in sites:
        check_site(model, site)
    found: dict[str, torch.Tensor] = {}

    def reader(site: str) -> Callable[..., None]:
        def read(value: torch.Tensor, hook: Any) -> None:
            if value.ndim == 4:
                value = rearrange(value, "context position head d -> context position (head d)")
            found[site] = value

        return read

    model.bridge.run_with_hooks(token_ids(model, tokens), fwd_hooks=[(site, reader(site)) for site in sites],
                                stop_at_layer=1 + max(map(layer_of, sites)), return_type=None)
    return found


@torch.inference_mode()
def losses(model: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """Next-token cross entropy in nats, float32 [context, position - 1], one context at a time."""
    rows = []
    for context in token_ids(model, tokens):
        logits = model.bridge(context[None], return_type="logits")[0, :-1].float()
        rows.append(torch.nn.functional.cross_entropy(logits, context[1:], reduction="none").cpu())
    return torch.stack(rows).numpy()


def kept(tokenizer: Any, tokens: np.ndarray, first: int) -> np.ndarray:
    """bool [context, position]: positions from ``first`` to the last but one, without the special tokens' ids."""
    positions = np.arange(tokens.shape[1])
    inside = (positions >= first) & (positions < tokens.shape[1] - 1)
    return inside[None] & ~np.isin(tokens, tokenizer.all_special_ids)


def token_ids(model: LoadedModel, tokens: np.ndarray) -> torch.Tensor:
    """The tokens as int64, on the model's device."""
    return torch.as_tensor(tokens, dtype=torch.long, device=next(model.bridge.original_model.parameters()).device)
