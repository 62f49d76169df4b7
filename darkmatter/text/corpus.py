"""The text of a preset: what it evaluates on, what SAEs are trained on; made once, then cached."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import cache
from ..errors import DarkmatterError
from . import files, mix, pile
from .builtin import EXTRA, MIX
from .contexts import Corpus, Picked
from .mix import RUN

if TYPE_CHECKING:
    from ..presets import Preset

__all__ = ["EXTRA", "MIX", "RUN", "Corpus", "evaluation", "training"]


def evaluation(preset: Preset, tokenizer: Any) -> Corpus:
    """The contexts that the preset evaluates on, cached by everything that determines them."""
    source = {"mix": mix, "pile": pile}.get(preset.corpus, files)
    return _cached(lambda: (source.evaluation(preset, tokenizer), {}), preset, tokenizer,
                   text=source.identity(preset), side="evaluation", contexts=preset.contexts,
                   version=1)


def training(preset: Preset, tokenizer: Any, contexts: int) -> Corpus:
    """``contexts`` contexts for SAE training, in shuffled order, as ``mix.training`` picks them.

    Raises DarkmatterError where there is not enough text, a package is missing, or the preset's
    text is another than the built-in mix, which alone has a side for training.
    """
    if preset.corpus != "mix":
        raise DarkmatterError("SAEs are trained on the built-in text only: set corpus to 'mix' to "
                              "train.")
    if not preset.training.clear:
        from . import plain  # this branch goes with it

        return _cached(lambda: plain.training(preset, tokenizer, contexts), preset, tokenizer,
                       text=mix.identity(preset), side="training", contexts=contexts, version=1)
    return _cached(lambda: mix.training(preset, tokenizer, contexts), preset, tokenizer,
                   text=mix.training_identity(preset), side="training", contexts=contexts,
                   version=2)


def identity_of(tokenizer: Any) -> list[Any]:
    """What a tokenizer's answers depend on: vocabulary, merges, normaliser, special tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast else sorted(tokenizer.get_vocab().items())
    return [rules, sorted(tokenizer.all_special_ids)]


def _cached(make: Callable[[], tuple[Iterable[Picked], Mapping[str, int]]], preset: Preset,
            tokenizer: Any, **parts: Any) -> Corpus:
    """What ``make`` gives: contexts by source, and how many of each domain were left out."""
    key = cache.key(**parts, length=preset.context_length, seed=preset.seed,
                    bos=preset.prepend_bos and tokenizer.bos_token_id,
                    tokenizer=identity_of(tokenizer))
    path = cache.root() / "tokens" / f"{key}.safetensors"
    with cache.lock(path.name):
        arrays = cache.load_arrays(path)
        if arrays is None:
            arrays = _arrays(preset, *make())
            cache.save_arrays(path, **arrays)
    dropped = json.loads(arrays["dropped"].tobytes()) if "dropped" in arrays else {}
    sources = tuple(json.loads(arrays["sources"].tobytes()))
    return Corpus(arrays["tokens"], arrays["source"], sources, dropped)


def _arrays(preset: Preset, picked: Iterable[Picked], dropped: Mapping[str, int]
            ) -> dict[str, np.ndarray]:
    names, contexts = zip(*picked, strict=True)
    tokens = np.concatenate(contexts)
    owner = np.repeat(np.arange(len(names), dtype=np.int32), [len(rows) for rows in contexts])
    # The mix is shuffled, so that any part of it has all domains; other texts keep their order.
    rng = np.random.default_rng(preset.seed)
    order = rng.permutation(len(tokens)) if preset.corpus == "mix" else slice(None)
    packed = {name: np.frombuffer(json.dumps(value).encode(), np.uint8)
              for name, value in (("sources", names), ("dropped", dropped))}
    return {"tokens": tokens[order], "source": owner[order], **packed}
