"""One look for every figure and table of the book, and figures that more than one chapter draws.

Functions here draw what a DataFrame holds and compute nothing. A chapter's figures end with
``finish``, its tables are ``table``, its computed prose is ``prose``. Labels are Unicode with
<sub>, <sup> (‖x‖², R²) rather than TeX.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import Markdown

if TYPE_CHECKING:
    from ..regression.draws import Draws

# Told apart with any colour vision, each at least 3:1 against its page: (on white, on dark).
COLOURS = {
    "blue": ("1,101,162", "92,155,250"), "orange": ("175,65,38", "251,138,63"),
    "green": ("3,154,104", "59,216,153"), "purple": ("127,40,195", "219,138,210"),
    "amber": ("166,129,0", "254,221,76"), "grey": ("97,94,100", "155,156,158"),
}
MEANING = {"nonlinear error": "orange", "linear error": "blue", "linear part": "blue",
           "absent-feature gap": "blue", "absent features": "green"}
WIDTH = "SAE width (latents)"


def colour(name: str, alpha: float = 1.0) -> str:
    """The CSS colour called ``name`` in COLOURS; a dark page swaps it for its twin."""
    return f"rgba({COLOURS[name][0]},{alpha:g})"


_AXIS = {"automargin": True, "showline": True, "ticks": "outside", "zeroline": False,
         "title": {"standoff": 10, "font": {"size": 14}}}
pio.templates["darkmatter"] = go.layout.Template(layout={
    "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
    "font_size": 14, "hovermode": "closest", "colorway": [colour(name) for name in COLOURS],
    "margin": {"l": 64, "r": 28, "t": 36, "b": 52},
    "xaxis": {**_AXIS, "showgrid": False, "ticklabeloverflow": "allow"}, "yaxis": _AXIS,
    "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "traceorder": "normal"},
})
pio.templates.default = "darkmatter"


class PlotlyMime:
    """myst-nb's entry point for plotly outputs; inert where ``book/_ext/bookfigures.py`` is not."""

    mime_priority_overrides = (("html", "application/vnd.plotly.v1+json", 1),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[Any] | None:
        env = getattr(renderer.renderer, "sphinx_env", None)
        render = getattr(getattr(env, "app", None), "render_plotly", None)
        ours = data.mime_type == PlotlyMime.mime_priority_overrides[0][1] and not inline
        return render(renderer, data) if ours and render else None


def finish(fig: go.Figure, name: str, caption: str, alt: str, *, paper: str = "",
           height: int = 400) -> go.Figure:
    """Give ``fig`` its label, caption and description: the last call of every figure.

    ``name``: the label, as in {numref}`fig-ladder`. ``caption``: MyST markdown, so an f-string with
    computed numbers, $math$ and references. ``alt``: what it shows, for those who cannot see it.
    ``paper``: its counterpart in the paper (v1), "Figure 1". ``height``: pixels. Raises ValueError
    unless the name starts with ``fig-`` and there are words.
    """
    if not name.startswith("fig-") or not caption.strip() or not alt.strip():
        raise ValueError(f"figure {name!r} needs a name that starts with 'fig-', a caption and an "
                         "alt text")
    # The page swaps each colour for its twin where it is dark.
    dark = {f"rgba({light},": f"rgba({dark}," for light, dark in COLOURS.values()}
    meta = {"name": name, "paper": paper, "caption": " ".join(caption.split()),
            "alt": " ".join(alt.split()), "dark": dark}
    legend = fig.to_dict()["layout"].get("showlegend") is not False
    return fig.update_layout(height=height, margin_t=36 if legend else 12, meta=meta)


def prose(text: str) -> Markdown:
    """Markdown computed by a cell; an indented triple-quoted f-string is fine."""
    return Markdown(inspect.cleandoc(text))


def number(value: float | None, digits: int = 3) -> str:
    """``0.241``; an en dash where there is no value."""
    return "–" if value is None or pd.isna(value) else f"{value:,.{digits}f}".replace("-", "−")


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """``0.241 [0.238, 0.244]``; without the brackets where the interval is not known."""
    ends = [number(low, digits), number(high, digits)]
    return number(value, digits) + ("" if "–" in ends else f" [{ends[0]}, {ends[1]}]")


def within(least: float, most: float) -> str:
    """A range in words: ``0.30 to 0.72``, ``above 0.90``; an end that is NaN is open."""
    digits = 2 if all(pd.isna(end) or round(end, 2) == end for end in (least, most)) else 3
    low, high = number(least, digits), number(most, digits)
    if low == "–" or high == "–":
        return "–" if low == high else f"below {high}" if low == "–" else f"above {low}"
    return f"{low} to {high}"


class Table(dict[str, str]):
    """A numbered table by mime type: markdown for the book, HTML for a notebook, plain text."""

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return dict(self)


def table(frame: pd.DataFrame, caption: str, name: str,
          digits: int | Mapping[str, int] = 3) -> Table:
    """A numbered table of a frame's columns, as {numref}`tab-ladder`.

    Cells and ``caption`` may hold MyST markdown. ``digits``: decimals of floats, one for all or by
    column. Raises ValueError unless the name starts with ``tab-``.
    """
    if not name.startswith("tab-"):
        raise ValueError(f"the name of a table starts with 'tab-', but this is {name!r}")

    def cell(column: str, value: Any) -> str:
        if isinstance(value, (bool, str)):
            return str(value)
        places = digits if isinstance(digits, int) else digits.get(column, 3)
        return number(value, 0 if isinstance(value, (int, np.integer)) else places)

    cells = pd.DataFrame({column: [cell(column, value) for value in frame[column]]
                          for column in frame})
    marks = ["---:" if pd.api.types.is_numeric_dtype(kind) else ":---" for kind in frame.dtypes]
    rows = [list(cells.columns), marks, *cells.to_numpy().tolist()]
    safe = ((str(text).replace("|", "\\|") for text in row) for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in safe]
    head = [f"~~~~{{table}} {' '.join(caption.split())}", f":name: {name}", ""]
    return Table({"text/markdown": "\n".join([*head, *lines, "~~~~"]),
                  "text/html": f"<p>{caption}</p>{cells.to_html(index=False, border=0)}",
                  "text/plain": cells.to_string(index=False)})


def _groups(df: pd.DataFrame, group: str | None) -> Iterator[tuple[int, str, str, pd.DataFrame]]:
    """(position, label, colour's name, rows) of each group, in order of appearance."""
    for place, label in enumerate([""] if group is None else dict.fromkeys(df[group])):
        rows = df if group is None else df.loc[df[group] == label, :]
        usual = list(COLOURS)[place % len(COLOURS)]
        yield place, str(label), MEANING.get(str(label), usual), rows


def _bars(rows: pd.DataFrame, y: str, **style: Any) -> dict[str, Any]:
    """plotly's error bars from the columns ``low`` and ``high``, where there are such."""
    if not {"low", "high"} <= set(rows):
        return {"visible": False}
    return {"array": rows["high"] - rows[y], "arrayminus": rows[y] - rows["low"],
            "symmetric": False, "thickness": 1.6, "width": 4, **style}


def error_bars(draws: Iterable[Draws], **style: Any) -> dict[str, Any]:
    """plotly's error bars (``error_y=``, ``error_x=``): the 95% interval of each of some Draws."""
    return _bars(pd.DataFrame([value.row for value in draws]).astype(float), "value", **style)


def source(function: Callable[..., Any]) -> Markdown:
    """The source of a function below its name and file: for a chapter whose subject it is."""
    plain = inspect.unwrap(function)
    file = Path(inspect.getfile(plain)).resolve().relative_to(Path(__file__).resolve().parents[2])
    code = textwrap.dedent(inspect.getsource(plain)).strip()
    return Markdown(f"`{plain.__qualname__}`, in `{file.as_posix()}`:\n\n~~~~python\n{code}\n~~~~")


def _log_axis(title: str, *values: float) -> dict[str, Any]:
    """A logarithmic axis with a tick at each of the values that stands apart."""
    ticks: list[float] = []
    for value in sorted(values):  # labels of nearer ones would overlap
        if not ticks or value > 1.2 * ticks[-1]:
            ticks.append(value)
    text = [f"{tick:,.0f}" if tick >= 100 else f"{tick:.3g}" for tick in ticks]
    return {"title_text": title, "type": "log", "tickvals": ticks, "ticktext": text}


def interval_points(df: pd.DataFrame, x: str, y: str = "value", *, x_title: str, y_title: str,
                    group: str | None = None, log_x: bool = True) -> go.Figure:
    """Joined points of ``y`` against ``x`` with intervals (low, high), one colour a ``group``."""
    fig, middle = go.Figure(), (len(set(df[group])) - 1) / 2 if group else 0
    for place, label, name, rows in _groups(df.sort_values(x, kind="stable"), group):
        # Beside one another, so that no group's bars hide another's.
        moved = rows[x] * 1.035 ** (place - middle) if log_x else rows[x]
        fig.add_scatter(x=moved, y=rows[y], error_y=_bars(rows, y), name=label,
                        mode="lines+markers", line_width=1.5, line_color=colour(name),
                        marker={"size": 9, "symbol": place}, customdata=rows[x],
                        hovertemplate="%{customdata:,}: %{y:.3f}")
    fig.update_xaxes(_log_axis(x_title, *df[x]) if log_x else {"title_text": x_title})
    return fig.update_yaxes(title_text=y_title).update_layout(showlegend=group is not None)


def bars_by_setting(df: pd.DataFrame, x: str, y: str = "value", *, y_title: str,
                    x_title: str = "", group: str | None = None) -> go.Figure:
    """Bars from zero of ``y`` for each category of ``x``, side by side by ``group``."""
    fig = go.Figure()
    for _, label, name, rows in _groups(df, group):
        fig.add_bar(x=rows[x].astype(str), y=rows[y], name=label, marker_color=colour(name, 0.7),
                    error_y=_bars(rows, y, color=colour("grey")))
    fig.update_xaxes(title_text=x_title, type="category")
    fig.update_yaxes(title_text=y_title, rangemode="tozero")
    return fig.update_layout(barmode="group", bargap=0.3, showlegend=group is not None)


def histogram(df: pd.DataFrame, value: str, *, x_title: str, group: str | None = None,
              bins: int = 60, log_x: bool = False, log_y: bool = False) -> go.Figure:
    """The share of each group's rows in each bin of ``value``; binned here to keep pages small."""
    fig, (low, high) = go.Figure(), np.quantile(df[value], [0, 1]).tolist()
    edges = (np.geomspace if log_x else np.linspace)(low, high, bins + 1)
    for _, label, name, rows in _groups(df, group):
        share = np.histogram(rows[value], edges)[0] / max(1, len(rows))
        fig.add_scatter(x=edges, y=[*share, share[-1]], name=label, mode="lines", line_shape="hv",
                        line_width=1.5, line_color=colour(name), fill="tozeroy",
                        fillcolor=colour(name, 0.25))
    digits = (1, 2, 5) if low > 0 and high < 1000 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-9, 12) for digit in digits]
    shown = [tick for tick in ticks if low <= tick <= high]
    fig.update_xaxes(_log_axis(x_title, *shown) if log_x else {"title_text": x_title})
    fig.update_yaxes(title_text="share", tickformat="~%")
    if log_y:
        fig.update_yaxes(type="log", dtick=1)
    return fig.update_layout(showlegend=group is not None)


def bands(points: pd.DataFrame, curve: pd.DataFrame, asymptote: float, floor: float) -> go.Figure:
    """The paper's Figure 1, FVU against width: absent features, the gap, and nonlinear error.

    ``points``: width, fvu, low, high, nonlinear (one row an SAE). ``curve``: width, fit (the power
    law, drawn past the last SAE). ``asymptote``: the fit's constant; ``floor``: the mean
    FVU_nonlinear. A constant that is not above it leaves no absent-feature gap: no line, no band.
    """
    fig, wide, fit = go.Figure(), curve["width"], curve["fit"]
    # Each band is filled down to the one drawn before it: its upper edge, and where its label is.
    edges = [("nonlinear error", 0 * fit + floor, -1, floor / 2)]
    if asymptote > floor:
        edges.append(("absent-feature gap", 0 * fit + asymptote, -1, (floor + asymptote) / 2))
    border = max(asymptote, floor)
    edges.append(("absent features", fit, 0, border + (fit.iloc[0] - border) / 6))
    for label, top, end, y in edges:
        name = MEANING[label]
        fig.add_scatter(x=wide, y=top, mode="lines", name=label, line_width=1.5,
                        line_color=colour(name), fill="tonexty" if fig.data else "tozeroy",
                        fillcolor=colour(name, 0.3), showlegend=False)
        fig.add_annotation(x=np.log10(wide.iloc[end]), y=y, text=label, showarrow=False,
                           xanchor="right" if end else "left", xshift=-8 if end else 8)
    common = {"x": points["width"], "mode": "markers", "marker_size": 9}
    fig.add_scatter(y=points["fvu"], name="FVU", marker_color=colour("green"),
                    error_y=_bars(points, "fvu"), **common)
    fig.add_scatter(y=points["nonlinear"], name="FVU<sub>nonlinear</sub>",
                    marker_color=colour("orange"), marker_symbol="square", **common)
    fig.update_yaxes(title_text="share of variance", rangemode="tozero")
    fig.update_xaxes(_log_axis(WIDTH, *points["width"], wide.iloc[-1]))
    return fig.update_xaxes(range=np.log10([wide.iloc[0] / 1.1, wide.iloc[-1] * 1.02]))


def grid_points(df: pd.DataFrame, value: str, *, value_title: str, digits: int = 2) -> go.Figure:
    """Figures 2 and 3 with few SAEs: points over ``width`` and ``l0``, coloured by ``value``."""
    bar = {"title": {"text": value_title, "side": "right"}, "thickness": 12}
    marker = {"size": 22, "color": df[value], "colorscale": "Cividis", "showscale": True,
              "line": {"width": 1.5, "color": colour("grey")}, "colorbar": bar}
    fig = go.Figure().add_scatter(
        x=df["width"], y=df["l0"], mode="markers+text", marker=marker, cliponaxis=False,
        text=[number(v, digits) for v in df[value]], textposition="top center")
    fig.update_xaxes(_log_axis(WIDTH, *df["width"])).update_layout(showlegend=False)
    return fig.update_yaxes(_log_axis("L0 (active latents a token)", *df["l0"]))
