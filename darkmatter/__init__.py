"""Darkmatter: what is the error of a sparse autoencoder made of?

    import darkmatter as dm
    result = dm.decompose(sae, x, source=document_ids)

Importing this imports nothing else; each public name brings what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import DarkmatterError
    from .evaluator import Evaluator
    from .presets import Preset
    from .regression.decompose import decompose
    from .regression.draws import Draws
    from .regression.result import Decomposition

__version__ = "0.1.0"

PUBLIC = {
    "decompose": ".regression.decompose",
    "Decomposition": ".regression.result",
    "Draws": ".regression.draws",
    "Evaluator": ".evaluator",
    "DarkmatterError": ".errors",
    "Preset": ".presets",
}
__all__ = [
    "DarkmatterError", "Decomposition", "Draws", "Evaluator", "Preset", "__version__", "decompose",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'darkmatter' has no attribute '{name}'")
    return getattr(importlib.import_module(PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
