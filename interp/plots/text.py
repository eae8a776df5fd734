"""Text coloured token by token."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
import xarray as xr

from ..errors import PlotError
from .given import numbers
from .labels import visible
from .page import Figure

#: Red above zero, blue below; so faint at most that words on them can be read, on paper and in the dark (WCAG AA).
RED, BLUE, MOST = "178, 24, 43", "33, 102, 172", 0.55
STYLE = """<style>
  .tokens { font: 14px/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 8px 0 18px; max-width: 1180px;
    overflow-wrap: anywhere; }
  .tokens span { padding: 2px 0; border-radius: 2px; white-space: pre-wrap; }
  .tokens .mark { color: var(--muted); }
  .series { margin: 6px 0 10px; font-size: 13px; } .series select { font: inherit; color: var(--ink);
    background: var(--panel); border: 1px solid var(--rule); border-radius: 4px; padding: 3px 6px; }
  .key { font-size: 12px; color: var(--muted); margin: 4px 0 0; }
  .key i { display: inline-block; width: 90px; height: 10px; margin: 0 6px; vertical-align: baseline; }
  @media print { .tokens span { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>"""
#: The series that is chosen colours the tokens; values stand in the page once.
SCRIPT = (
    """
  document.addEventListener("DOMContentLoaded", () => {
    for (const data of document.querySelectorAll("script.token-values")) {
      const box = data.parentElement, {values, names, most} = JSON.parse(data.textContent), choice = box.querySelector("select");
      const spans = [...box.querySelectorAll(".tokens span")];
      choice?.addEventListener("change", () => {
        const series = +choice.value;
        spans.forEach((span, at) => {
          const value = values[at][series], alpha = value === null ? 0 : Math.min(1, Math.abs(value) / most[series]) * MOST;
          span.style.background = `rgba(${value < 0 ? "BLUE" : "RED"}, ${alpha.toFixed(3)})`;
          span.title = value === null ? span.dataset.token : `${span.dataset.token}: ${+value.toPrecision(4)}`;
        });
        for (const end of box.querySelectorAll(".most")) end.textContent = (+most[series].toPrecision(3)).toString();
      });
    }
  });
""".replace("MOST", str(MOST))
    .replace("BLUE", BLUE)
    .replace("RED", RED)
)


def plot_tokens(
    tokens: Sequence[str] | Sequence[Sequence[str]] | xr.DataArray,
    values: object = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw text with each token coloured by a number: an activation, a loss, an attribution.

    Red is above zero, blue below, as strong as the number is beside the largest of its series; the hover has it. Spaces and line
    breaks that a token ends in are shown.

    Args:
        tokens: the tokens of one text, or of several; what `model.tokens` gives. Or values that know their tokens, from a cache:
            `model.run(text, "L3.neuron[5]").cache["L3.neuron[5]"]`; several units are series.
        values: a number for each token, `[token]`, or several, `[token, series]`, of which one is chosen on the page; of several
            texts a list with one such for each. NaN has no colour.
        names: of the series.
        title: heading of the page.

    Raises:
        PlotError: tokens and values that do not fit together, or no token.

    Examples:
        >>> labels = model.tokens("The Eiffel Tower is in Paris").labels
        >>> interp.plot_tokens(labels, range(len(labels))).save("tokens.html").name
        'tokens.html'
    """
    if isinstance(tokens, xr.DataArray) and values is None:
        tokens, values = labelled(tokens)
    tokens = getattr(tokens, "labels", tokens)
    if isinstance(tokens, str | bytes | Mapping) or not len(tokens):
        raise PlotError(f"plot_tokens needs a list of tokens, not {tokens!r}; model.tokens(text) gives one")
    several = not isinstance(tokens[0], str)
    texts = [_words(text) for text in (tokens if several else [tokens])]
    given = [numbers("values", part) for part in _parts(values, several)]
    if len(given) != len(texts):
        raise PlotError(f"plot_tokens was given {len(texts)} texts, but values of {len(given)}")
    tables = [part[:, None] if part.ndim == 1 else part for part in given]
    for number, (text, table) in enumerate(zip(texts, tables, strict=True)):
        if table.ndim != 2 or len(table) != len(text) or table.shape[1] != tables[0].shape[1] or not table.size:
            where = f"text {number} has" if several else "there are"
            raise PlotError(
                f"{where} {len(text)} tokens, but values of shape {list(given[number].shape)}; give [token] or [token, series]"
            )
    series = [str(name) for name in names] if names is not None else [f"series {n}" for n in range(tables[0].shape[1])]
    if len(series) != tables[0].shape[1]:
        raise PlotError(f"names has {len(series)} entries, but the values have {tables[0].shape[1]} series")
    every = np.concatenate(tables)
    sizes = np.where(np.isfinite(every), np.abs(every), 0)
    most = np.maximum(sizes.max(0), 1e-30)
    signed = bool((every < 0).any())
    lines = "".join(f'<div class="tokens">{_line(*pair, most)}</div>' for pair in zip(texts, tables, strict=True))
    body = f"{STYLE}{_chooser(series)}{_key(float(most[0]), signed)}{lines}"
    if len(series) > 1:
        body += f'<script type="application/json" class="token-values">{_held(every, series, most)}</script>'
    return Figure(None, title or "Tokens", "", f"<div>{body}</div>", SCRIPT if len(series) > 1 else "")


def labelled(values: xr.DataArray) -> tuple[list[list[str]], list[np.ndarray]]:
    """The tokens and values of an array of a cache, by prompt, without what is behind a prompt's end.

    Raises:
        PlotError: an array without the coordinate `token` by position, or with more dims than a series.
    """
    if "token" not in values.coords or "position" not in values.dims or values["token"].dims[-1] != "position":
        raise PlotError(f"these values, dims {values.dims}, do not know their tokens: give plot_tokens(tokens, values)")
    array = values if "prompt" in values.dims else values.expand_dims("prompt")
    rest = [str(dim) for dim in array.dims if dim not in ("prompt", "position")]
    if len(rest) > 1:
        raise PlotError(
            f"these values have dims {values.dims}: choose of {rest} until one is left, which are the series"
        )
    array = array.transpose("prompt", "position", *rest)
    words = np.atleast_2d(values["token"].values)
    texts, tables = [], []
    for row, table in zip(words, array.values, strict=True):
        kept = [place for place, word in enumerate(row) if word != ""]
        texts.append([str(row[place]) for place in kept])
        tables.append(table[kept])
    return texts, tables


def _words(text: object) -> list[str]:
    """The tokens of one text. PlotError: it is no list of words."""
    words = getattr(text, "labels", text)
    if isinstance(words, int | float) or not isinstance(words, Iterable):
        raise PlotError(f"plot_tokens needs the tokens of a text, not {text!r}; model.tokens(text) gives them")
    return [str(word) for word in words]


def _parts(values: object, several: bool) -> list[object]:
    """The values of each text. PlotError: they are not one for each."""
    if not several:
        return [values]
    if not isinstance(values, Iterable):
        raise PlotError(
            f"plot_tokens was given several texts, but as values {values!r}: give a list with one entry for each"
        )
    return list(values)


def _line(text: list[str], table: np.ndarray, most: np.ndarray) -> str:
    """A text as coloured spans, by its first series."""
    return "".join(_span(token, float(value), float(most[0])) for token, value in zip(text, table[:, 0], strict=True))


def _span(token: str, value: float, most: float) -> str:
    """One token."""
    known = bool(np.isfinite(value))
    alpha = min(1.0, abs(value) / most) * MOST if known else 0.0
    label = escape(visible(token, 200), quote=True)
    said = f"{label}: {value:.4g}" if known else label
    color = BLUE if known and value < 0 else RED
    shown = escape(token).replace("\n", '<b class="mark">↵</b>\n').replace("\t", '<b class="mark">⇥</b>')
    shown = shown or '<b class="mark">∅</b>'
    return f'<span style="background:rgba({color}, {alpha:.3f})" title="{said}" data-token="{label}">{shown}</span>'


def _chooser(series: list[str]) -> str:
    """The choice of a series, where there are several."""
    if len(series) < 2:
        return ""
    options = "".join(f'<option value="{place}">{escape(name)}</option>' for place, name in enumerate(series))
    return f'<div class="series"><label>coloured by <select>{options}</select></label></div>'


def _key(most: float, signed: bool) -> str:
    """The scale of colours, centred on zero where there are numbers below it."""
    low = f"rgba({BLUE}, {MOST})" if signed else "transparent"
    middle = ", transparent" if signed else ""
    ends = "−" if signed else "0"
    first = f'{ends}<span class="most">{most:.3g}</span>' if signed else "0"
    gradient = f"linear-gradient(90deg, {low}{middle}, rgba({RED}, {MOST}))"
    return f'<p class="key">{first}<i style="background:{gradient}"></i><span class="most">{most:.3g}</span></p>'


def _held(every: np.ndarray, series: list[str], most: np.ndarray) -> str:
    """The values of all tokens, as the page's script reads them."""
    rows = [[round(float(value), 6) if np.isfinite(value) else None for value in row] for row in every]
    data = {"values": rows, "names": series, "most": [float(value) for value in most]}
    return json.dumps(data).replace("</", "<\\/")
