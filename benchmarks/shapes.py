"""The rows, and their sizes.

Those are 'toy' (seconds, random numbers), 'smoke' (a minute, the model), 'default' (full size on
two cores, an hour or two) and 'gemma' (Gemma 2 2B and 9B with Gemma Scope, for a large GPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Case = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    function: str
    """module:function of this folder: from device and a case's values to a record's fields."""
    what: str
    against: str
    sense: str
    """'times' as fast as the baseline (more is better), or 'of' a floor (less is better)."""
    target: float | None
    uses: tuple[str, ...]
    """Modules of the package whose source the figure depends on."""
    target_memory: float | None = None


CORE = ("regression/moments", "regression/scores")
SURVEY = ("models/activations", "models/model", "regression/moments", "regression/passes",
          "saes/codes", "saes/loaded", "saes/kernels", "survey")
FLOOR = "one forward pass to the site + one encoder product"
POWER = "linear: cost grows as n to the power"
ROWS = {
    "regression": Row("regress:regression",
                      "regression of SaeError on x, one SAE, with held-out R²",
                      "torch.linalg.lstsq in float32, everything in memory", "times", 4, CORE,
                      1 / 3),
    "ladder": Row("regress:ladder", "the same for a ladder of SAEs at one site",
                  "the same for each SAE", "times", 12, CORE),
    "survey": Row("passes:run", "survey, all passes, one SAE", FLOOR, "of", 1.25, SURVEY),
    "survey-ladder": Row("passes:run", "survey of a whole ladder", f"{FLOOR} an SAE", "of", 1.25,
                         SURVEY),
    "survey-memory": Row("passes:memory", "peak memory of the survey beside weights",
                         "holding x and the error in float32", "of", 0.1, SURVEY),
    "pursuit": Row("greedy:run", "gradient pursuit", "a dense weight for every atom", "times", 8,
                   ("experiments/pursuit", "saes/kernels")),
    "cross-entropy": Row("splices:run", "cross entropy with x and three splices",
                         "a full forward pass for each", "times", None,
                         ("experiments/downstream", "models/model")),
    "training": Row("learning:run", "SAE training, TopK 32",
                    "sae-lens's stock TopK trainer on the same stream", "times", 4,
                    ("saes/kernels", "saes/topk", "saes/trainer")),
    "book": Row("wholebook:run", "make book", "20 minutes", "of", 1, ()),
    "cost-contexts": Row("passes:slope", "cost of the survey against contexts", POWER, "of", 1.05,
                         SURVEY),
    "cost-saes": Row("passes:slope", "cost of the survey against the number of SAEs", POWER, "of",
                     1.05, SURVEY),
}

KEPT = 246_900  # rows of 300 contexts of 823 kept tokens
TOY = {"source": "random", "contexts": 60, "kept": 40, "d": 24}
TOPK, JUMPRELU = ["topk", 64, 4], ["jumprelu", 64, 4]  # kind, width and L0 of a random SAE
SMOKE = {"source": "smoke", "saes_": [["topk", 256, 8]]}
WHOLE = {"source": "smollm2", "contexts": 300}
NARROW, WIDE = (f"artifact:smollm2-l15-w{width}-k32" for width in (4096, 16_384))


def _timed(pairs: int, limit: float, sizes: Case | None = None, **more: Any) -> Case:
    """Sizes that are measured in at most so many pairs, and begin none after ``limit`` seconds."""
    return {**(sizes or {}), **more, "pairs": pairs, "limit": limit}


def _random(kind: str, width: int, k: int, d: int) -> Case:
    return _timed(3, 10, source="random", contexts=60, kept=823, d=d, saes_=[[kind, width, k]])


SHAPES: dict[str, dict[str, dict[str, Case]]] = {
    "toy": {
        "regression": {"": _timed(2, 5, rows=1500, d=24, sae=[64, 4])},
        "ladder": {"": _timed(2, 5, rows=1500, d=24, sae=[64, 4], saes=3, of_baseline=2)},
        "survey": {"topk": _timed(3, 5, TOY, saes_=[TOPK], bootstrap=50),
                   "jumprelu": _timed(3, 5, TOY, saes_=[JUMPRELU], bootstrap=50)},
        "survey-memory": {"": {**TOY, "saes_": [TOPK]}},
        "pursuit": {"L0 4": _timed(2, 5, tokens=64, d=24, width=96, k=4)},
        "training": {"64": {"rows": 4096, "d": 24, "width": 64, "k": 4, "batch": 128, "steps": 12,
                            "limit": 5}},
        "cost-saes": {"": {**TOY, "over": "saes", "at": [1, 2], "saes_": [TOPK], "bootstrap": 50}},
    },
    "smoke": {
        "survey": {"256": _timed(3, 30, SMOKE, contexts=24)},
        "survey-memory": {"256": {**SMOKE, "contexts": 24}},
        "cross-entropy": {"": _timed(3, 30, source="smoke", positions=48)},
        "cost-contexts": {"": {**SMOKE, "over": "contexts", "at": [12, 24]}},
    },
    "default": {
        "regression": {"d 2304": _timed(3, 600, rows=KEPT, d=2304, sae=[16_384, 32])},
        "ladder": {"8 SAEs, d 2304": _timed(3, 900, rows=KEPT, d=2304, sae=[16_384, 32], saes=8,
                                            of_baseline=2)},
        "survey": {"width 16,384": _timed(3, 1800, WHOLE, saes_=[WIDE])},
        "survey-ladder": {"default ladder": _timed(3, 2400, WHOLE, saes_=[])},
        "survey-memory": {"width 16,384": {**WHOLE, "saes_": [WIDE]},
                          "default ladder": {**WHOLE, "saes_": []}},
        "pursuit": {f"L0 {k}": _timed(3, 400, tokens=512, d=576, width=16_384, k=k)
                    for k in (32, 60)},
        "cross-entropy": {"823 tokens": _timed(5, 200, source="smollm2", positions=823)},
        "training": {f"width {width:,}": {"rows": 262_144, "d": 576, "width": width, "k": 32,
                                          "batch": 4096, "steps": steps, "limit": 900}
                     for width, steps in ((4096, 120), (16_384, 40))},
        "book": {"": {"preset": "smollm2", "seconds": 1200}},
        "cost-contexts": {"width 4,096": {"over": "contexts", "at": [75, 150, 300, 600],
                                          "source": "smollm2", "saes_": [NARROW]}},
        "cost-saes": {"width 4,096": {"over": "saes", "at": [1, 2, 4, 8], "source": "random",
                                      "contexts": 300, "kept": 823, "d": 576,
                                      "saes_": [["topk", 4096, 32]]}},
    },
    "gemma": {
        "regression": {f"d {d}": _timed(3, 6, rows=KEPT, d=d, sae=[16_384, 60])
                       for d in (2304, 3584)},
        "ladder": {f"8 SAEs, d {d}": _timed(2, 8, rows=KEPT, d=d, sae=[16_384, 60], saes=8,
                                            of_baseline=2) for d in (2304, 3584)},
        "pursuit": {f"d {d}, width {width:,}, L0 {k}": _timed(3, 4, tokens=1024, d=d, width=width,
                                                              k=k)
                    for d, width, k in ((2304, 16_384, 32), (2304, 16_384, 60),
                                        (3584, 131_072, 60))},
        "training": {f"d {d}, width {width:,}": {"rows": 65_536, "d": d, "width": width, "k": 32,
                                                 "batch": 4096, "steps": 40, "limit": 5}
                     for d, width in ((2304, 4096), (2304, 16_384), (3584, 16_384))},
        "survey": {"JumpReLU, d 2304, width 16,384": _random("jumprelu", 16_384, 60, 2304),
                   "TopK, d 3584, width 131,072": _random("topk", 131_072, 60, 3584)},
    },
}
