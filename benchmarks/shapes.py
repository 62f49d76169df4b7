"""The rows, and their sizes: toy (seconds, random numbers), smoke (a minute, the model), default (the issue's sizes on
two cores, an hour or two), gemma (the sizes of Gemma 2 2B and 9B with Gemma Scope, random numbers, for a large GPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    function: str
    """module:function of this folder; called with the device and the case's values, returns the fields of a record."""
    what: str
    against: str
    sense: str
    """'times' as fast as the baseline (more is better), or 'of' the floor or baseline (less is better)."""
    target: float | None
    uses: tuple[str, ...]
    """Modules of the package whose source the figure depends on."""
    target_memory: float | None = None


CORE = ("regression/moments", "regression/scores")
SURVEY = ("activations", "codes", "model", "regression/moments", "regression/passes", "saes", "survey", "topk")
ROWS = {
    "regression": Row("regress:regression", "regression of SaeError on x, one SAE, with held-out R²",
                      "torch.linalg.lstsq in float32, everything in memory", "times", 4, CORE,
                      1 / 3),
    "ladder": Row("regress:ladder", "the same for a ladder of SAEs at one site", "the same for each SAE", "times", 12,
                  CORE),
    "survey": Row("passes:run", "survey, all passes, one SAE", "one forward pass to the site + one encoder product",
                  "of", 1.25, SURVEY),
    "survey-ladder": Row("passes:run", "survey of a whole ladder",
                         "one forward pass to the site + one encoder product an SAE", "of", 1.25, SURVEY),
    "survey-memory": Row("passes:memory", "peak memory of the survey beside weights",
                         "holding x and the error in float32", "of", 0.1, SURVEY),
    "pursuit": Row("greedy:run", "gradient pursuit", "a dense weight for every atom", "times", 8, ("pursuit", "topk")),
    "cross-entropy": Row("splices:run", "cross entropy with x and three splices", "a full forward pass for each",
                         "times", None, ("downstream", "model")),
    "training": Row("learning:run", "SAE training, TopK 32", "sae-lens's stock TopK trainer on the same stream",
                    "times", 4, ("topk", "training")),
    "book": Row("wholebook:run", "make book", "20 minutes", "of", 1, ()),
    "cost-contexts": Row("passes:slope", "cost of the survey against contexts", "linear: cost grows as n to the power",
                         "of", 1.05, SURVEY),
    "cost-saes": Row("passes:slope", "cost of the survey against the number of SAEs",
                     "linear: cost grows as n to the power", "of", 1.05, SURVEY),
}


def _survey(limit: float, **case: Any) -> Case:
    return {"pairs": 3, "limit": limit, **case}


def _random(kind: str, width: int, k: int, d: int, limit: float = 10) -> Case:
    return _survey(limit, source="random", contexts=60, kept=823, d=d, saes_=[[kind, width, k]])


KEPT = 246_900  # rows of 300 contexts of 823 kept tokens

SHAPES: dict[str, dict[str, dict[str, Case]]] = {
    "toy": {
        "regression": {"": {"rows": 1500, "d": 24, "sae": [64, 4], "pairs": 2, "limit": 5}},
        "ladder": {"": {"rows": 1500, "d": 24, "sae": [64, 4], "saes": 3, "of_baseline": 2, "pairs": 2, "limit": 5}},
        "survey": {
            "topk": _survey(5, source="random", contexts=60, kept=40, d=24, saes_=[["topk", 64, 4]], bootstrap=50),
            "jumprelu": _survey(5, source="random", contexts=60, kept=40, d=24, saes_=[["jumprelu", 64, 4]],
                                bootstrap=50)},
        "survey-memory": {"": {"source": "random", "contexts": 60, "kept": 40, "d": 24, "saes_": [["topk", 64, 4]]}},
        "pursuit": {"L0 4": {"tokens": 64, "d": 24, "width": 96, "k": 4, "pairs": 2, "limit": 5}},
        "training": {"64": {"rows": 4096, "d": 24, "width": 64, "k": 4, "batch": 128, "steps": 12, "limit": 5}},
        "cost-saes": {"": {"over": "saes", "at": [1, 2], "source": "random", "contexts": 60, "kept": 40, "d": 24,
                           "saes_": [["topk", 64, 4]], "bootstrap": 50}},
    },
    "smoke": {
        "survey": {"256": _survey(30, source="smoke", contexts=24, saes_=[["topk", 256, 8]])},
        "survey-memory": {"256": {"source": "smoke", "contexts": 24, "saes_": [["topk", 256, 8]]}},
        "cross-entropy": {"": {"source": "smoke", "positions": 48, "pairs": 3, "limit": 30}},
        "cost-contexts": {"": {"over": "contexts", "at": [12, 24], "source": "smoke", "saes_": [["topk", 256, 8]]}},
    },
    "default": {
        "regression": {"d 2304": {"rows": KEPT, "d": 2304, "sae": [16_384, 32], "pairs": 3, "limit": 600}},
        "ladder": {"8 SAEs, d 2304": {"rows": KEPT, "d": 2304, "sae": [16_384, 32], "saes": 8,
                                      "of_baseline": 2, "pairs": 3, "limit": 900}},
        "survey": {"width 16,384": _survey(1800, source="smollm2", contexts=300,
                                           saes_=["artifact:smollm2-l15-w16384-k32"])},
        "survey-ladder": {"default ladder": _survey(2400, source="smollm2", contexts=300, saes_=[])},
        "survey-memory": {"width 16,384": {"source": "smollm2", "contexts": 300,
                                           "saes_": ["artifact:smollm2-l15-w16384-k32"]},
                          "default ladder": {"source": "smollm2", "contexts": 300, "saes_": []}},
        "pursuit": {f"L0 {k}": {"tokens": 512, "d": 576, "width": 16_384, "k": k, "pairs": 3, "limit": 400}
                    for k in (32, 60)},
        "cross-entropy": {"823 tokens": {"source": "smollm2", "positions": 823, "pairs": 5, "limit": 200}},
        "training": {f"width {width:,}": {"rows": 262_144, "d": 576, "width": width, "k": 32, "batch": 4096,
                                          "steps": steps, "limit": 900}
                     for width, steps in ((4096, 120), (16_384, 40))},
        "book": {"": {"preset": "smollm2", "seconds": 1200}},
        "cost-contexts": {"width 4,096": {"over": "contexts", "at": [75, 150, 300, 600], "source": "smollm2",
                                          "saes_": ["artifact:smollm2-l15-w4096-k32"]}},
        "cost-saes": {"width 4,096": {"over": "saes", "at": [1, 2, 4, 8], "source": "random", "contexts": 300,
                                      "kept": 823, "d": 576, "saes_": [["topk", 4096, 32]]}},
    },
    "gemma": {
        "regression": {f"d {d}": {"rows": KEPT, "d": d, "sae": [16_384, 60], "pairs": 3, "limit": 6}
                       for d in (2304, 3584)},
        "ladder": {f"8 SAEs, d {d}": {"rows": KEPT, "d": d, "sae": [16_384, 60], "saes": 8, "of_baseline": 2,
                                         "pairs": 2, "limit": 8} for d in (2304, 3584)},
        "pursuit": {f"d {d}, width {width:,}, L0 {k}": {"tokens": 1024, "d": d, "width": width, "k": k, "pairs": 3,
                                                        "limit": 4}
                    for d, width, k in ((2304, 16_384, 32), (2304, 16_384, 60), (3584, 131_072, 60))},
        "training": {f"d {d}, width {width:,}": {"rows": 65_536, "d": d, "width": width, "k": 32, "batch": 4096,
                                                 "steps": 40, "limit": 5}
                     for d, width in ((2304, 4096), (2304, 16_384), (3584, 16_384))},
        "survey": {"JumpReLU, d 2304, width 16,384": _random("jumprelu", 16_384, 60, 2304),
                   "TopK, d 3584, width 131,072": _random("topk", 131_072, 60, 3584)},
    },
}
