"""Row 'book': the time of the last `make book`, as it wrote it down, beside what it may take."""

from __future__ import annotations

import json
from typing import Any

from . import timing


def run(device: str, preset: str, seconds: float) -> dict[str, Any]:
    """How long the notebooks of the last build took, beside the ``seconds`` they may take.

    A notebook that found things in the cache was faster than it will be without, which its record
    does not say: for the figure of an empty cache, build with an empty DARKMATTER_CACHE and no
    _build first.
    """
    try:
        built = json.loads((timing.HOME / "_build" / f"built-{preset}.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"The book has not been built; run 'make book PRESET={preset}' first.") from None
    if built["kept"]:
        raise ValueError(f"The last build kept {', '.join(built['kept'])} from an earlier one: "
                         "remove _build and build with an empty cache.")
    found = [json.loads(path.read_text())
             for path in (timing.HOME / "_build" / "records" / preset).glob("*.json")]
    ratio = built["seconds"] / seconds
    return {"ratio": ratio, "low": ratio, "high": ratio, "pairs": 1,
            "ours_seconds": built["seconds"], "baseline_seconds": seconds,
            "notebooks": built["notebooks"],
            "peak_memory_gib": max(each["peak_memory_gib"] for each in found)}
