"""While an SAE trains: how much of its error is linear in x, in the log of sae-lens's trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .regression.decompose import decompose

if TYPE_CHECKING:
    from .regression.decompose import Rows, Sources

METRICS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm")


class Evaluator:
    """What ``sae_lens``'s trainers take as ``evaluator``: METRICS, under 'dark_matter/…'.

    ``x`` and ``source`` as in ``decompose``: activations as the SAE's user has them, not seen in
    training.
    """

    def __init__(self, x: Rows, source: Sources | None = None) -> None:
        self.x, self.source = x, source

    def __call__(self, sae: Any, data_provider: Any, activation_scaler: Any) -> dict[str, float]:
        """The metrics of the SAE as it is now; the trainer's scaling of activations is undone."""
        result = decompose(lambda x: activation_scaler.unscale(sae(activation_scaler(x))), self.x,
                           source=self.source, draws=20)
        return {f"dark_matter/{name}": float(getattr(result, name)) for name in METRICS}
