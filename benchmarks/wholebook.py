"""Row 'book': the time of `make book`, added up from the records that its notebooks left."""

from __future__ import annotations

import json
from typing import Any

from . import timing


def run(device: str, preset: str, seconds: float) -> dict[str, Any]:
    """How long the notebooks of the last build took, beside the ``seconds`` they may take.

    A notebook that found things in the cache was faster than it will be without, which its record does not say: for
    the figure of an empty cache, build with an empty DARKMATTER_CACHE and no _build first.
    """
    folder = timing.HOME / "_build" / "records" / preset
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    chapters = sorted(path.stem for path in (timing.HOME / "notebooks").glob("*.py"))
    if missing := set(chapters) - {each["notebook"] for each in found} - {"15_speed"}:
        raise ValueError(f"No record of {', '.join(sorted(missing))}; run 'make book PRESET={preset}' first.")
    taken = {each["notebook"]: each.get("wall_seconds", each["seconds"]) for each in found}
    total = sum(taken.values())
    return {"ratio": total / seconds, "low": total / seconds, "high": total / seconds, "pairs": 1,
            "ours_seconds": total, "baseline_seconds": seconds, "notebooks": taken,
            "peak_memory_gib": max(each["peak_memory_gib"] for each in found)}
