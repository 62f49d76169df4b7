"""``python -m benchmarks``: measure the rows asked for, each written down as it is done."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from .report import FOLDER, Report, source
from .shapes import ROWS, SHAPES


def main(words: list[str] | None = None) -> int:
    """Returns 0 when every row asked for is measured, 1 when one failed, 2 for a bad question."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", default="",
                        help=f"with commas between (default: all): {', '.join(ROWS)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shapes", choices=SHAPES, default="default", help="sizes of the inputs")
    parser.add_argument("--pairs", type=int, help="at most so many pairs a row")
    parser.add_argument("--limit", type=float, default=float("inf"),
                        help="begin no row after so many seconds")
    parser.add_argument("--again", action="store_true",
                        help="measure again what was measured with the same code")
    parser.add_argument("--out", type=Path, default=FOLDER,
                        help="folder of the records (default: artifacts/bench)")
    asked = parser.parse_args(words)
    named = [name.strip() for name in asked.rows.split(",") if name.strip()]
    chosen = named or list(SHAPES[asked.shapes])
    if unknown := [name for name in chosen if name not in SHAPES[asked.shapes]]:
        parser.error(f"the sizes '{asked.shapes}' have no row {', '.join(unknown)}; "
                     f"there are {', '.join(SHAPES[asked.shapes])}")
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; leave --device out")
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # a float32 product is one
    report, failed, begun = Report(asked.device, asked.out), 0, time.perf_counter()
    for name in chosen:
        for label, case in SHAPES[asked.shapes][name].items():
            if time.perf_counter() - begun > asked.limit:
                print(f"{name} {label}: left for another time", flush=True)
            else:
                failed += not _measured(report, asked, name, label, case)
    print(f"{report.path}: {failed} failed" if failed else str(report.path))
    return 1 if failed else 0


def _measured(report: Report, asked: argparse.Namespace, name: str,
              label: str, case: dict[str, Any]) -> bool:
    """Measure one case of a row; False where it failed, which does not stop the others."""
    key, row = " / ".join(filter(None, (asked.shapes, name, label))), ROWS[name]
    version = source(name, case)
    if report.done(key, version) and not asked.again:
        print(f"{key}: measured before", flush=True)
        return True
    module, function = row.function.split(":")
    fewer = asked.pairs and "pairs" in case
    given = {**case, **({"pairs": min(asked.pairs, case["pairs"])} if fewer else {})}
    about = {"row": name, "case": label, "shapes": asked.shapes,
             "device": asked.device, "sizes": case, "what": row.what,
             "against": row.against, "sense": row.sense, "target": row.target,
             "target_memory": row.target_memory}
    begun = time.perf_counter()
    try:
        found = getattr(importlib.import_module(f".{module}", __package__),
                        function)(asked.device, **given)
    except Exception as error:
        traceback.print_exc()
        report.add(key, about | {"error": f"{type(error).__name__}: {error}"[:600]})
        return False
    finally:
        if asked.device.startswith("cuda"):
            torch.cuda.empty_cache()
    spent = time.perf_counter() - begun
    report.add(key, about | found | {"source": version, "seconds": round(spent, 1)})
    sides = " and ".join(f"{found[side]:.3g} s" for side in ("baseline_seconds", "ours_seconds")
                         if side in found)
    print(f"{key}: {found['ratio']:.3g} [{found['low']:.3g}, {found['high']:.3g}], target "
          f"{row.target}, {sides}, {found['pairs']} pairs, {spent:.0f} s in all", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
