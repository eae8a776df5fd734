"""Several pictures and text as one standalone page: BokehJS stands in it once, or not at all where nothing is drawn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from html import escape
from typing import Protocol

from bokeh.embed import file_html
from bokeh.models.ui.ui_element import UIElement
from bokeh.resources import Resources

from .theme import CSS, SCRIPT


class Picture(Protocol):
    """What a figure has."""

    @property
    def layout(self) -> UIElement | None: ...
    @property
    def title(self) -> str: ...
    @property
    def body(self) -> str: ...
    @property
    def script(self) -> str: ...
    def _repr_html_(self) -> str: ...


_TEMPLATE = """
{% block postamble %}
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{ css }}</style>
<script>{{ script }}</script>
{% endblock %}
{% block contents %}
<main{{ alone | safe }} data-bokeh="yes">
{% for before, label, root in pieces %}{{ before | safe }}
<div class="picture" role="group" tabindex="0" aria-label="{{ label | e }}">
{{ embed(roots[root]) }}
</div>
{% endfor %}{{ after | safe }}
</main>
{% endblock %}
"""
_PLAIN = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{css}</style>
<script>{script}</script>
</head>
<body>
<main{alone}>
{body}
</main>
</body>
</html>
"""


def standalone(title: str, parts: Sequence[str | Picture], css: str = "", script: str = "", bare: bool = False) -> str:
    """A page of HTML and figures in this order; `css` and `script` come behind the theme's.

    Text that is coloured (`plot_tokens`) stands as it is, a page of its own (`plot_features`) in a frame. `bare`: as wide as
    its content.
    """
    pieces: list[tuple[str, str, int]] = []
    layouts: list[UIElement] = []
    text: list[str] = []
    scripts = [SCRIPT, script]
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        elif part.layout is None:
            label = escape(f"picture: {part.title}", quote=True)
            text.append(
                f'<div class="picture" role="group" tabindex="0" aria-label="{label}">{part.body or part._repr_html_()}</div>'
            )
            if part.script not in scripts:
                scripts.append(part.script)
        else:
            own = copy.deepcopy(part).layout if part.layout in layouts else part.layout
            assert own is not None
            layouts.append(own)
            pieces.append(("".join(text), f"picture: {part.title}", len(layouts) - 1))
            text = []
    alone = ' class="alone"' if bare else ""
    styles, code = CSS + css, "\n".join(filter(None, scripts))
    if not layouts:
        return _PLAIN.format(title=escape(title), css=styles, script=code, body="".join(text), alone=alone)
    words = {"css": styles, "script": code, "pieces": pieces, "after": "".join(text), "alone": alone}
    return file_html(layouts, Resources(mode="inline"), title, template=_TEMPLATE, template_variables=words)
