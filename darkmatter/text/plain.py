"""``clear: false``: a training text of the mix's shares alone, repeats of evaluation text and all.

GOES when the default suite is trained on the clear text, and with it ``Training.clear``, its lines
in smoke.yaml and smollm2.yaml, the branch in ``corpus.training``, 'clear' in
``saes.training.OTHERS``, and the words on it in chapter 1. Nothing else knows of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import mix
from .contexts import Picked

if TYPE_CHECKING:
    from ..presets import Preset


def training(preset: Preset, tokenizer: Any, contexts: int) -> tuple[list[Picked], dict[str, int]]:
    """Each domain's share, from its first training sources, at least 16 of them if long enough."""
    picked: list[Picked] = []
    for domain, wanted in mix.shares(contexts).items():
        sources, most = mix.sources(domain, preset, tokenizer), max(20, -(-wanted // 16))
        list(mix.held_out(domain, sources))  # passed over
        some = ((source, mix.spread(rows, most)) for source, rows in sources)
        picked += mix.exactly(domain, some, wanted, "fewer distinct_tokens, or set clear")
    return picked, {}
