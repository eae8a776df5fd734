"""Features of a dictionary as a page to look through: where they fire, how often, and what they say about the next token.

The page is plain HTML: nothing of Bokeh's is drawn on it. What is shown is computed in `interp.saes.dashboard`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from ..errors import PlotError
from ..models.model import Model
from ..pairs import PromptPairs
from ..saes.dashboard import COMMON, SHOWN, Dashboard, Feature, choose, dashboard
from ..saes.passages import rows_of
from ..saes.views import view_of
from ..sites import Site
from ..tokens import Text
from ..views import View
from .given import whole
from .page import FONT, INK, MUTED, RULE, Figure

if TYPE_CHECKING:
    from ..saes.library import Dictionary

#: Levels between 0 and a feature's largest activation in which activations of tokens are kept.
LEVELS = 1000
#: What the page says of promoted and suppressed tokens.
DIRECT = (
    "Promoted and suppressed tokens are those of the direct path alone: a feature's decoder row through the final norm, "
    "whose scale is frozen at its mean over the texts, and the unembedding."
)
MAX_TOKENS = 600_000  # that a page shows; each is about seven bytes of it


@dataclass(frozen=True, eq=False, repr=False)
class FeaturePage(Figure):
    """A figure that is a page of its own: `page` is the whole of it."""

    layout: None  # type: ignore[assignment]
    page: str = ""

    def html(self) -> str:
        """The whole page as text; it opens with no network."""
        return self.page

    def __reduce__(self) -> tuple[type[FeaturePage], tuple[None, str, str, str, str, str]]:
        """Pickled and copied as its text."""
        return FeaturePage, (None, self.title, self.subtitle, "", "", self.page)


def plot_features(
    model: Model,
    sae: Dictionary,
    texts: Iterable[str | Sequence[int]] | PromptPairs | str,
    features: Iterable[int] | int | None = None,
    *,
    site: str | Site | None = None,
    top: int = 10,
    context: int = 16,
    length: int = 128,
    max_tokens: int | None = None,
    title: str | None = None,
) -> Figure:
    """A page of a dictionary's features over texts, with a search by number or token and a choice of order.

    Of each feature: the contexts in which it fires most, tokens coloured by activation; the histogram of its activations above
    0, and its density, the share of tokens on which it fires; the five features of the dictionary whose activations correlate
    most with its own; the ten tokens that it promotes and suppresses most by the direct path: its decoder row through the
    final norm, whose scale is frozen at its mean over the texts, and the unembedding.

    Args:
        sae: a dictionary of SAELens, as `interp.SparseAutoencoder` and `interp.load_sae` give it.
        texts: strings or token ids in any form of `prompts_of`, or pairs whose clean prompts are taken. They are cut into rows
            of `length` tokens, each run by itself behind the model's prefix, which is among these and is not counted.
        features: numbers. None: the 50 that fire most often among those that fire on less than a tenth of the tokens (if there
            are fewer, more common ones too, the least common first); the texts are run twice then.
        site: where the dictionary belongs, if it does not say.
        top, context: so many contexts of each feature, with so many tokens on each side of the largest; of two activations
            within so many tokens of each other the larger stands for both.
        max_tokens: the first so many tokens of the texts are enough; None is all.
        title: heading of the page.

    Returns:
        A Figure, which is saved as .html or .png, or shown in a notebook.

    Raises:
        PlotError: a feature that the dictionary does not have, sizes below 1, more than fits a page. PlanError: a dictionary
            whose site is not known, no text, no feature that fires. SiteError: a site that the model does not have.

    Examples:
        >>> interp.plot_features(model, sae, list(pairs.clean), features=range(3)).save("features.html").name
        'features.html'
    """
    for name, size in (("top", top), ("context", context)):
        if whole(name, size) < 1:
            raise PlotError(f"{name}={size}; it is 1 or more")
    view = view_of(sae, site)
    model.require(view.site())
    numbers = None if features is None else checked(view, features)
    fits(SHOWN if numbers is None else len(numbers), top, context)
    rows = rows_of(model, texts, length, max_tokens)
    seen = dashboard(model, view, rows, choose(model, view, rows) if numbers is None else numbers, top, context)
    count = rows[-1].index[-1][0] + 1
    lines = [
        f"{len(seen.features):,} of {view.parts:,} features of {view.name} at {view.tap} of {model.name}, over "
        f"{seen.tokens:,} tokens of {count:,} {'text' if count == 1 else 'texts'}"
    ]
    if numbers is None:
        lines.append(f"the features that fire most often, those on less than {COMMON:.0%} of the tokens first")
    words = title or f"Features of {view.name}"
    subtitle = "\n".join(lines)
    return FeaturePage(None, words, subtitle, page=page_of(words, subtitle, contents(model, seen)))


def checked(view: View, features: Iterable[int] | int) -> list[int]:
    """Features by number, each once, in the order given.

    Raises:
        PlotError: none, what is no number, or one that the view does not have.
    """
    if isinstance(features, str | bytes):
        raise PlotError(f"features={features!r}; give a list of whole numbers")
    listed = list(features) if isinstance(features, Iterable) else [features]
    numbers = list(dict.fromkeys(whole("a feature", feature) for feature in listed))
    if not numbers:
        raise PlotError("features is empty: name at least one, or leave it out for those that fire most often")
    for number in numbers:
        if not 0 <= number < view.parts:
            raise PlotError(f"feature {number} is out of range: {view.name} has features 0 to {view.parts - 1}")
    return numbers


def fits(features: int, top: int, context: int) -> None:
    """PlotError: more tokens than a page can show."""
    shown = features * top * (2 * context + 1)
    if shown > MAX_TOKENS:
        raise PlotError(
            f"{features} features with {top} contexts of {2 * context + 1} tokens are {shown:,} tokens, too many for one page "
            f"({MAX_TOKENS:,}): name fewer features=, or lower top= or context="
        )


def contents(model: Model, seen: Dashboard) -> dict[str, object]:
    """What the page draws, as plain data: tokens are numbers of words."""
    words: dict[int, int] = {}
    features = [feature_data(feature, words) for feature in seen.features]
    text = Text(model.tokenizer)
    return {
        "tokens": seen.tokens,
        "levels": LEVELS,
        "noDirect": seen.no_direct,
        "words": [text.label(token) for token in words],
        "features": features,
    }


def feature_data(feature: Feature, words: dict[int, int]) -> dict[str, object]:
    """One feature; `words` are the tokens so far and their numbers, and grow."""

    def word(token: int) -> int:
        return words.setdefault(token, len(words))

    unit = LEVELS / feature.largest if feature.largest > 0 else 0.0
    used = max((at + 1 for at, count in enumerate(feature.histogram) if count), default=0)
    return {
        "n": feature.number,
        "f": feature.fires,
        "m": short(feature.largest),
        "h": feature.histogram[:used],
        "w": feature.width,
        "c": [
            [
                *(context.text, context.position, short(context.activations[context.at]), context.at),
                [word(token) for token in context.ids],
                [max(1, round(value * unit)) if value > 0 else 0 for value in context.activations],
            ]
            for context in feature.contexts
        ],
        "r": [[number, short(r)] for number, r in feature.beside],
        "p": [[word(token), short(by)] for token, by in feature.raised],
        "s": [[word(token), short(by)] for token, by in feature.lowered],
    }


def short(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")


def page_of(title: str, subtitle: str, data: dict[str, object]) -> str:
    """The page: what stands in double braces in its template is put in in one pass, so that no text is taken for one."""
    folder = resources.files(__package__).joinpath("data")
    template, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("features.html", "features.js"))
    said = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    values = {
        "title": html.escape(title),
        "subtitle": "".join(f"<p>{html.escape(line)}</p>" for line in subtitle.splitlines()),
        "notes": "" if data["noDirect"] else DIRECT,
        "data": said.replace("<", "\\u003c"),  # no token ends the script or begins a comment in it
        "script": script,
        "font": FONT,
        "ink": INK,
        "muted": MUTED,
        "rule": RULE,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
