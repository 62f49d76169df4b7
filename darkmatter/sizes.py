"""Sizes of models and SAEs, before anything is downloaded: from a table, a configuration, or a name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from . import model, releases
from .preset import Preset

CODED = 100  # active latents a token where a name does not tell


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model."""

    layers: int
    d: int
    ff: int
    heads: int
    kv_heads: int
    d_head: int
    vocabulary: int
    gated: bool = True
    """Three maps in the MLP rather than two."""
    tied: bool = True
    """One matrix for embedding and unembedding."""
    norms: int = 2
    """Norms of d weights in a layer."""
    eager: bool = False
    """Whether attention's scores are written out (soft-caps have no fused kernel)."""
    bytes: int = 2
    """Of a weight as it is downloaded."""

    @property
    def layer(self) -> int:
        """Weights of one layer that are multiplied."""
        z = self.heads * self.d_head
        return 2 * self.d * z + 2 * self.d * self.kv_heads * self.d_head + (2 + self.gated) * self.d * self.ff

    @property
    def parameters(self) -> int:
        """All weights but biases and positions."""
        return self.layers * (self.layer + self.norms * self.d) + self.d + self.vocabulary * self.d * (2 - self.tied)

    def width(self, site: str) -> int:
        """Dimensions of a site."""
        return self.heads * self.d_head if site.endswith("hook_z") else self.d

    def forward(self, layers: int, length: int) -> float:
        """Operations a token of a forward pass through the first layers, with attention over ``length`` positions."""
        return layers * (2 * self.layer + 4 * length * self.heads * self.d_head)


SHAPES = {  # as published with the models
    "google/gemma-2-2b": Shape(26, 2304, 9216, 8, 4, 256, 256_000, norms=4, eager=True),
    "google/gemma-2-9b": Shape(42, 3584, 14_336, 16, 8, 256, 256_000, norms=4, eager=True),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256, tied=False),
    "gpt2": Shape(12, 768, 3072, 12, 12, 64, 50_257, gated=False, norms=4, bytes=4),
    "google/gemma-3-270m": Shape(18, 640, 2048, 4, 1, 256, 262_144, norms=4),
    "google/gemma-3-1b-pt": Shape(26, 1152, 6912, 4, 1, 256, 262_144, norms=4),
    "gemma-3-270m-q4": Shape(18, 640, 2048, 4, 1, 256, 262_144, norms=4, bytes=1),
    "smollm2": Shape(30, 576, 1536, 9, 3, 64, 49_152, bytes=1),
}


@dataclass(frozen=True)
class Sae:
    """Sizes of an SAE, and whether it is downloaded, and in how many bytes a weight."""

    d: int
    width: int
    l0: float
    bytes: int

    @property
    def weights(self) -> int:
        return 2 * self.d * self.width + 2 * self.width + self.d


def shape_of(preset: Preset) -> Shape:
    """A model's sizes: of a published model from the table, of any other from its configuration."""
    if preset.model in SHAPES:
        return SHAPES[preset.model]
    config = model.opened(preset, AutoConfig.from_pretrained)
    config = getattr(config, "text_config", None) or config
    heads, d = config.num_attention_heads, config.hidden_size
    ff = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d
    gpt2 = config.model_type == "gpt2"
    return Shape(config.num_hidden_layers, d, ff, heads, getattr(config, "num_key_value_heads", None) or heads,
                 getattr(config, "head_dim", None) or d // heads, config.vocab_size, gated=not gpt2,
                 tied=bool(getattr(config, "tie_word_embeddings", True)), norms=4 if "gemma" in config.model_type
                 or gpt2 else 2, eager=bool(getattr(config, "attn_logit_softcapping", None)))


def sae_of(ref: str, preset: Preset, shape: Shape) -> Sae:
    """Sizes of an SAE as far as its reference tells: a directory's own file, else the name; 16,384 where neither."""
    d, (kind, _, rest) = shape.width(preset.site), ref.partition(":")
    config = Path(ref if Path(ref).is_dir() else rest).expanduser() / "cfg.json"
    if config.exists():
        told = json.loads(config.read_text())
        width = told.get("d_sae") or told.get("num_latents") or told["d_in"] * told.get("expansion_factor", 16)
        return Sae(d, int(width), float(told.get("k") or CODED), 0)
    if own := re.search(r"(?:train:|-w)(\d+)(?:x|-k)(\d+)", ref):
        return Sae(d, int(own[1]), float(own[2]), 0)
    _, name, l0 = releases._told(rest, {})
    size = releases.size(name) or 16_384
    return Sae(d, size * d if name.endswith("x") else size, l0 or CODED, 2 if "llama_scope" in kind else 4)
