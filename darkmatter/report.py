"""One SAE's report as one page: what its error is made of, in text that can be read, and beside the shipped SAEs.

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

from . import figures, model, outputs, pertoken, records, saes, survey
from . import preset as presets
from .errors import DarkmatterError
from .preset import Preset

SHOWN = ("plays", "scripture", "reference", "code", "dictionary")  # domains of the built-in text that may be printed
LENGTH, AROUND, WORST, A_CONTEXT = 160, 12, 15, 2  # tokens of the passage, beside a bad token, bad tokens, of a context
FALL_BACK = "FVU as it was when its training ended, on other text"


def write(path: Path, preset: Preset, result: Mapping[str, Any]) -> None:
    """Write the page of a ``decompose`` result, whose survey is read back from the cache, to ``path`` (one .html file).

    Raises DarkmatterError when the place cannot be written to.
    """
    outputs.write(path, page(preset, result))


def page(preset: Preset, result: Mapping[str, Any]) -> str:
    """The page's HTML. ``result``: what ``decomposition.decompose`` returned for the preset's one SAE.

    Text is shown of the user's own file, and of the domains of the built-in text that may be printed; else none.
    """
    surveyed = survey.run(preset)
    tokens = surveyed.tokens(surveyed.names[preset.saes[0]])
    tokenizer, hidden = model.load_tokenizer(preset), concealed(preset, tokens)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     loader=jinja2.FileSystemLoader(Path(__file__).parent))
    environment.filters["number"] = figures.number
    ladder, shown = reference(), passage(tokens, tokenizer, hidden)
    tallest = max((row[part] for row in shown or () for part in ("linear", "nonlinear")), default=0.0)
    return environment.get_template("report.html").render(
        sae=preset.saes[0], width=int(surveyed.rows["width"].iloc[0]), preset=preset, result=result,
        parts=parts(result), metrics=metrics(result), shares=shares(tokens), passage=shown, tallest=tallest or 1.0,
        worst=worst(tokens, tokenizer, hidden), ladder=ladder, fall_back=FALL_BACK, colours=colours(),
        widest=max([result["fvu"] or 0.0, *(row["fvu"] for row in ladder)]) or 1.0, unit=surveyed.unit,
        provenance=records.provenance(preset.device))


def parts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The variance of x in parts that add up to 1: rebuilt, linear error, nonlinear error (name, share).

    Beyond 1 where FVU is: then nothing is rebuilt. A part that the estimates put below 0 is drawn as 0.
    """
    fvu, nonlinear = result["fvu"] or 0.0, result["fvu_nonlinear"] or 0.0
    found = [("rebuilt", 1 - fvu), ("linear error", fvu - nonlinear), ("nonlinear error", nonlinear)]
    total = sum(max(0.0, share) for _, share in found)
    return [{"name": name, "share": share, "drawn": 100 * max(0.0, share) / total} for name, share in found]


METRICS = {
    "l0": ("L0", "active latents a token"),
    "dead_share": ("dead latents", "share of the latents that fired on no token of this text"),
    "fvu": ("FVU", "share of the variance of x that the SAE leaves unexplained"),
    "fvu_nonlinear": ("FVU_nonlinear", "what is left of it when the best linear function of x is added"),
    "r2_vector": ("R² of the error vector", "how much of the error is a linear function of x, mean over dimensions"),
    "r2_vector_weighted": ("R², weighted by variance", "the same, each dimension by its variance"),
    "r2_norm": ("R² of the squared error norm", "how well x tells, linearly, how large the error will be"),
}


def metrics(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: name, value with its 95% interval, what it means, and a note where there is one."""
    rows = [(text, result[key], result["intervals"].get(key), about, key) for key, (text, about) in METRICS.items()]
    rows += [(f"norm test of {name}", value, result["intervals"]["norm_test"].get(name),
              "how well the squared norm of this vector is a linear function of x", f"norm_test_{name}")
             for name, value in result["norm_test"].items()]
    found = []
    for text, value, ends, about, key in rows:
        low, high = ends or (None, None)
        found.append({"name": text, "value": figures.interval(value, low, high), "about": about,
                      "note": result.get("notes", {}).get(key, "")})
    return found


def concealed(preset: Preset, tokens: pd.DataFrame) -> tuple[str, ...]:
    """Domains whose words are not printed: for a file none, for the built-in text some, for the Pile all."""
    if preset.corpus not in ("mix", "pile"):
        return ()
    return tuple(name for name in tokens["domain"].unique() if preset.corpus == "pile" or name not in SHOWN)


def shares(tokens: pd.DataFrame) -> dict[str, float]:
    """Medians over the held-out tokens of both errors' squared norms as shares of the token's own ‖x‖²."""
    held = tokens.query("is_eval")
    return {name: float(np.median(held[f"{name}_norm2"] / held["x_norm2"])) for name in ("linear", "nonlinear")}


def passage(tokens: pd.DataFrame, tokenizer: Any, hidden: Sequence[str]) -> list[dict[str, Any]] | None:
    """Consecutive held-out tokens: text, and the squared norms of both errors as shares of the token's own ‖x‖²."""
    for length in (LENGTH, 60, 20):
        try:
            return described(tokens.iloc[pertoken.stretch(tokens, tokenizer, length, hidden=hidden)], tokenizer)
        except DarkmatterError:  # nothing so long that may be shown
            continue
    return None


def described(rows: pd.DataFrame, tokenizer: Any) -> list[dict[str, Any]]:
    """Each token's text, the norm of its error, and the squared norms of the error and its parts as shares of ‖x‖²."""
    found = pd.DataFrame({name: rows[f"{name}_norm2"] / rows["x_norm2"] for name in ("error", "linear", "nonlinear")})
    found["norm"] = rows["error_norm2"] ** 0.5
    found["text"] = [tokenizer.decode([each]) for each in rows["token_id"]]
    return found.to_dict("records")  # type: ignore[return-value]


def worst(tokens: pd.DataFrame, tokenizer: Any, hidden: Sequence[str]) -> list[dict[str, Any]]:
    """The held-out tokens with the largest ‖SaeError‖², at most two of a context, with the text around each."""
    allowed = tokens.query("is_eval and domain not in @hidden").sort_values("error_norm2", ascending=False)
    chosen = allowed.groupby("context", sort=False).head(A_CONTEXT).head(WORST)
    found = described(chosen, tokenizer)
    for row, (index, token) in zip(found, chosen.iterrows(), strict=True):
        near = tokens.loc[index - AROUND:index + AROUND]  # type: ignore[operator]
        near = near[near["context"] == token["context"]]
        row["before"], row["after"] = (tokenizer.decode(near.loc[side, "token_id"].tolist())
                                       for side in (near.index < index, near.index > index))
    return found


def reference() -> list[dict[str, Any]]:
    """The shipped SAEs, narrow to wide: name, width, l0, fvu, and fvu_nonlinear and r2_norm where they are known.

    From the records of a book built here with the default preset; else from what is written in the SAEs' files.
    """
    known: dict[str, dict[str, float]] = {}
    for record in records.load_all(every_preset=True):
        if record["preset"] == presets.DEFAULT:
            for row in record["metrics"]:
                if row["protocol"] == "strict" and row["name"] in METRICS and row["value"] is not None:
                    known.setdefault(row["sae"], {})[row["name"]] = row["value"]
    found = []
    for path in sorted(saes.ARTIFACTS.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["record"])
        if f"artifact:{path.stem}" in presets.load(presets.DEFAULT).saes:
            mine = known.get(path.stem, {})
            found.append({"name": path.stem, "width": told["width"], "l0": told["k"], "fvu": told["fvu"],
                          "fvu_nonlinear": None, "r2_norm": None} | mine | {"measured": "fvu_nonlinear" in mine})
    return sorted(found, key=lambda row: (row["width"], row["l0"]))


def colours() -> dict[str, tuple[str, str]]:
    """CSS colours of the parts, on light and on dark."""
    named = {"linear": figures.MEANING["linear error"], "nonlinear": figures.MEANING["nonlinear error"],
             "rebuilt": "grey"}
    return {part: (f"rgb({figures.COLOURS[name][0]})", f"rgb({figures.COLOURS[name][1]})")
            for part, name in named.items()}
