"""One SAE's report as one page: what its error is made of, shown in text and beside other SAEs.

The page is a single file that asks for nothing: no scripts, no fonts, no pictures from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from safetensors import safe_open

from .. import outputs, presets, survey
from ..errors import DarkmatterError
from ..models import model
from ..presets import Preset
from ..saes import artifacts
from . import figures, records

# Domains of the built-in text that may be printed.
SHOWN = ("plays", "scripture", "reference", "code", "dictionary")
LENGTHS = (160, 60, 20)  # tokens of the passage: the longest that may be shown
AROUND, WORST, A_CONTEXT = 12, 15, 2  # tokens beside one of the worst; worst tokens; of a context
FALL_BACK = "FVU as it was when its training ended, on other text"


def write(path: Path, preset: Preset, result: Mapping[str, Any]) -> None:
    """Write the page of a ``decompose`` result, whose survey is in the cache, to an .html file.

    Raises DarkmatterError when the place cannot be written to.
    """
    outputs.write(path, page(preset, result))


def page(preset: Preset, result: Mapping[str, Any]) -> str:
    """The page's HTML. ``result``: of ``decomposition.decompose`` for the preset's one SAE.

    Text is shown of the user's own file, and of the domains of the built-in text that may be
    printed; else none.
    """
    surveyed = survey.run(preset)
    tokens = surveyed.tokens(surveyed.names[preset.saes[0]])
    tokenizer, hidden = model.load_tokenizer(preset), concealed(preset, tokens)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     loader=jinja2.FileSystemLoader(Path(__file__).parent))
    environment.filters["number"] = figures.number
    environment.filters["percent"] = lambda share, digits=0: f"{100 * share:.{digits}f}%"
    ladder, shown = reference(), passage(tokens, tokenizer, hidden)
    tallest = max((row[part] for row in shown or () for part in ("linear", "nonlinear")), default=0)
    return environment.get_template("report.html").render(
        sae=preset.saes[0], width=int(surveyed.rows["width"].iloc[0]), preset=preset,
        result=result, parts=parts(result), metrics=metrics(result), shares=shares(tokens),
        passage=shown, tallest=tallest or 1.0, worst=worst(tokens, tokenizer, hidden),
        ladder=ladder, fall_back=FALL_BACK, colours=colours(), unit=surveyed.unit,
        widest=max([result["fvu"] or 0.0, *(row["fvu"] for row in ladder)]) or 1.0,
        provenance=records.provenance(preset.device))


def parts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The variance of x in parts that add up to 1: rebuilt, linear error, nonlinear error.

    Beyond 1 where FVU is: then nothing is rebuilt. ``drawn``: percent; 0 where a share is below 0.
    """
    fvu, nonlinear = result["fvu"] or 0.0, result["fvu_nonlinear"] or 0.0
    named = {"rebuilt": 1 - fvu, "linear error": fvu - nonlinear, "nonlinear error": nonlinear}
    total = sum(max(0.0, share) for share in named.values())
    return [{"name": name, "share": share, "drawn": 100 * max(0.0, share) / total}
            for name, share in named.items()]


METRICS = {
    "l0": ("L0", "active latents a token"),
    "dead_share": ("dead latents", "share of the latents that fired on no token of this text"),
    "fvu": ("FVU", "share of the variance of x that the SAE leaves unexplained"),
    "fvu_nonlinear": ("FVU_nonlinear",
                      "what is left of it when the best linear function of x is added"),
    "r2_vector": ("R² of the error vector",
                  "how much of the error is a linear function of x, mean over dimensions"),
    "r2_vector_weighted": ("R², weighted by variance", "the same, each dimension by its variance"),
    "r2_norm": ("R² of the squared error norm",
                "how well x tells, linearly, how large the error will be"),
}
NORM_TEST = "how well the squared norm of this vector is a linear function of x"


def metrics(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: name, value with its 95% interval, what it means, and its note if any."""
    values, ends = dict(result), dict(result["intervals"])
    about = dict(METRICS)
    for name, value in result["norm_test"].items():
        key = f"norm_test_{name}"
        values[key], ends[key] = value, ends["norm_test"].get(name)
        about[key] = (f"norm test of {name}", NORM_TEST)
    rows = []
    for key, (name, meaning) in about.items():
        low, high = ends.get(key) or (None, None)
        rows.append({"name": name, "value": figures.interval(values[key], low, high),
                     "about": meaning, "note": result.get("notes", {}).get(key, "")})
    return rows


def concealed(preset: Preset, tokens: pd.DataFrame) -> tuple[str, ...]:
    """Domains not to be printed: of a file none, of the built-in text some, of the Pile all."""
    if preset.corpus not in ("mix", "pile"):
        return ()
    return tuple(name for name in tokens["domain"].unique()
                 if preset.corpus == "pile" or name not in SHOWN)


def shares(tokens: pd.DataFrame) -> dict[str, float]:
    """Medians over the held-out tokens of both errors' squared norms, as shares of ‖x‖²."""
    held = tokens.query("is_eval")
    return {name: float(np.median(held[f"{name}_norm2"] / held["x_norm2"]))
            for name in ("linear", "nonlinear")}


def passage(tokens: pd.DataFrame, tokenizer: Any, hidden: Sequence[str]
            ) -> list[dict[str, Any]] | None:
    """Consecutive held-out tokens, ``described``; None where none may be shown."""
    from ..experiments import per_token

    for length in LENGTHS:
        try:
            rows = per_token.stretch(tokens, tokenizer, length, hidden=hidden)
        except DarkmatterError:  # nothing so long that may be shown
            continue
        return described(tokens.iloc[rows], tokenizer)
    return None


def described(rows: pd.DataFrame, tokenizer: Any) -> list[dict[str, Any]]:
    """Each token's text, ‖error‖, and the squared norms of the error and its parts over ‖x‖²."""
    table = pd.DataFrame({name: rows[f"{name}_norm2"] / rows["x_norm2"]
                          for name in ("error", "linear", "nonlinear")})
    table["norm"] = rows["error_norm2"] ** 0.5
    table["text"] = [tokenizer.decode([token]) for token in rows["token_id"]]
    return table.to_dict("records")  # type: ignore[return-value]


def worst(tokens: pd.DataFrame, tokenizer: Any, hidden: Sequence[str]) -> list[dict[str, Any]]:
    """The held-out tokens with the largest ‖SaeError‖², with the text around each."""
    allowed = tokens.query("is_eval and domain not in @hidden")
    allowed = allowed.sort_values("error_norm2", ascending=False)
    chosen = allowed.groupby("context", sort=False).head(A_CONTEXT).head(WORST)
    rows = described(chosen, tokenizer)
    for row, (index, token) in zip(rows, chosen.iterrows(), strict=True):
        near = tokens.loc[index - AROUND:index + AROUND]  # type: ignore[operator]
        near = near[near["context"] == token["context"]]
        row["before"], row["after"] = (tokenizer.decode(near.loc[side, "token_id"].tolist())
                                       for side in (near.index < index, near.index > index))
    return rows


def reference() -> list[dict[str, Any]]:
    """The shipped SAEs, narrow to wide: name, width, l0, fvu; fvu_nonlinear and r2_norm or None.

    From the records of a book built here with the default preset; else from the SAEs' files.
    """
    known: dict[str, dict[str, float]] = {}
    for record in records.load_all(every_preset=True):
        if record["preset"] == presets.DEFAULT:
            for row in record["metrics"]:
                kept = row["protocol"] == "strict" and row["name"] in METRICS
                if kept and row["value"] is not None:
                    known.setdefault(row["sae"], {})[row["name"]] = row["value"]
    ladder, names = [], presets.load(presets.DEFAULT).saes
    for path in sorted(artifacts.FOLDER.glob("*.safetensors")):
        if f"artifact:{path.stem}" in names:
            with safe_open(path, "pt") as file:
                trained = json.loads(file.metadata()["record"])
            measured = known.get(path.stem, {})
            ladder.append({"name": path.stem, "width": trained["width"], "l0": trained["k"],
                           "fvu": trained["fvu"], "fvu_nonlinear": None, "r2_norm": None,
                           **measured, "measured": "fvu_nonlinear" in measured})
    return sorted(ladder, key=lambda row: (row["width"], row["l0"]))


def colours() -> dict[str, tuple[str, str]]:
    """CSS colours of the parts, on light and on dark."""
    named = {part: figures.MEANING[f"{part} error"] for part in ("linear", "nonlinear")}
    return {part: (f"rgb({figures.COLOURS[name][0]})", f"rgb({figures.COLOURS[name][1]})")
            for part, name in {**named, "rebuilt": "grey"}.items()}
