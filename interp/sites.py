"""Sites: named places in a transformer where an activation can be read or written.

Standard library only; sites also travel to a remote server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from .errors import SiteError


class Kind(NamedTuple):
    """What a kind of site is: one line of the table `TABLE`, which everything asks that must treat kinds apart.

    `axis` is what its activation is divided into ("head", "kv head", "unit"; "" for nothing) and `view` how those parts
    stand in the tensor of its tap (`interp.views`): "whole", "slice" (an indexed part), "decoder" (parts are seen in
    `through` and written as their difference, decoded) or "mixture" (z = P·v of a pattern P). `width` is what a number of
    the site belongs to.
    """

    name: str
    axis: str = ""
    view: str = "whole"
    width: str = "d_model"  # "d_model" | "d_head" | "d_mlp" | "": no vector of a token
    layered: bool = True
    #: the layer whose input a row must be there for, counted from the site's own; a kind without a layer comes before all
    stage: int = 0
    #: the kind whose tensor it is read off and written through
    through: str = ""
    #: some architectures multiply it with a number before they add it to the stream (`taps["branch"]`)
    branch: bool = False
    #: whether the stream holds the very same tensor, so that it is written in place ("shared"), or another reader does, so
    #: that gradients are taken of a view of its own ("own")
    tensor: str = ""
    sends: bool = False  # whether edges start here
    reads: str = ""  # which reader of `interp.order` it is, where edges end here
    hook: str = ""  # TransformerLens's name below `blocks.N.`
    #: a cache keeps what it was before it is edited, so that later tokens would not see the edit
    behind_cache: bool = False


#: Every kind of site, in the order in which a forward pass reaches them inside a block. `mlp_in` is what an MLP receives,
#: behind its norm.
TABLE = (
    Kind("embed", layered=False, stage=-1, sends=True),
    Kind("resid_pre", hook="hook_resid_pre"),
    Kind("q", "head", "slice", "d_head", reads="q", hook="attn.hook_q"),
    Kind("k", "kv head", "slice", "d_head", reads="k", hook="attn.hook_k"),
    Kind("v", "kv head", "slice", "d_head", reads="v", hook="attn.hook_v"),
    Kind("q_rot", "head", "slice", "d_head", hook="attn.hook_rot_q"),
    Kind("k_rot", "kv head", "slice", "d_head", hook="attn.hook_rot_k", behind_cache=True),
    Kind("pattern", "head", "mixture", "", through="z", hook="attn.hook_pattern"),
    Kind("z", "head", "slice", "d_head", hook="attn.hook_z"),
    Kind("head_out", "head", "decoder", through="z", sends=True, hook="attn.hook_result"),
    Kind("attn_out", branch=True, hook="hook_attn_out"),
    Kind("resid_mid", tensor="shared", hook="hook_resid_mid"),
    Kind("mlp_in", tensor="own"),
    Kind("mlp_pre", "unit", "slice", "d_mlp", hook="mlp.hook_pre"),
    Kind("neuron", "unit", "slice", "d_mlp", hook="mlp.hook_post"),
    Kind("mlp_out", branch=True, sends=True, reads="mlp", hook="hook_mlp_out"),
    Kind("resid_post", stage=1, hook="hook_resid_post"),
    Kind("logits", width="", layered=False, reads="logits"),
)
#: The table by name.
KIND = {kind.name: kind for kind in TABLE}
#: Names that travel as their number.
KINDS = tuple(KIND)
#: Kinds whose activation has a head axis; k, v and k_rot are counted by key/value head.
HEAD_KINDS = tuple(kind.name for kind in TABLE if kind.axis.endswith("head"))
KV_KINDS = tuple(kind.name for kind in TABLE if kind.axis == "kv head")
UNIT_KINDS = tuple(kind.name for kind in TABLE if kind.axis == "unit")
LAYERLESS = tuple(kind.name for kind in TABLE if not kind.layered)
#: Nodes of a circuit that edges start from, and that they end at.
SENDERS = tuple(kind.name for kind in TABLE if kind.sends)
RECEIVERS = tuple(kind.name for kind in TABLE if kind.reads)


class Coordinates(Protocol):
    """What a site asks of a view that is nobody's kind: `interp.View` fulfils it."""

    @property
    def name(self) -> str: ...
    @property
    def tap(self) -> Site: ...
    @property
    def parts(self) -> int: ...
    @property
    def width(self) -> int | None: ...


_TEXT = re.compile(
    r"^(?:L(?P<layer>-?\d+)(?:\.H(?P<head>\d+))?(?:\.(?P<kind>[a-z_]+))?|(?P<bare>embed|logits))"
    r"(?:\[(?P<unit>\d+)\])?(?:@(?P<position>-?\d+))?$"
)
_HOOKS = {kind.hook: kind.name for kind in TABLE if kind.hook}
_HOOK = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Site:
    """One place in the model: a kind, and optionally layer, head, position and unit.

    Layers and positions count from 0, negative from the end. A head, position or unit left out means all of
    them. `Site("z", layer=9, head=6, position=-1)` and `Site.parse("L9.H6.z@-1")` are the same site. A site of a `view`
    (made by `View.site`) has the view's name as its kind, and parts of it as its units.

    Raises:
        SiteError: an unknown kind, or a layer, head or unit on a kind that has none.

    Examples:
        >>> interp.Site.parse("blocks.9.attn.hook_z").at(head=6)
        Site(kind='z', layer=9, head=6, position=None, unit=None, view=None)
        >>> str(interp.Site("z", layer=9, head=6, position=-1))
        'L9.H6.z@-1'
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    unit: int | None = None
    view: Coordinates | None = None

    def __post_init__(self) -> None:
        if self.view is None and self.kind not in KINDS:
            raise SiteError(f"unknown site kind {self.kind!r}; the kinds are: {', '.join(KINDS)}")
        if self.kind in LAYERLESS and self.layer is not None:
            raise SiteError(f"site {self.kind!r} has no layer, but layer={self.layer} was given")
        if self.head is not None and self.kind not in HEAD_KINDS:
            raise SiteError(f"site {self.kind!r} has no heads; kinds with heads are: {', '.join(HEAD_KINDS)}")
        if self.unit is not None and self.axis != "unit":
            raise SiteError(f"site {self.kind!r} has no units; kinds with units are: {', '.join(UNIT_KINDS)}")

    @property
    def facts(self) -> Kind:
        """What the table says of its kind; of a view's site, what it says of the tap, but for the units."""
        if self.view is None:
            return KIND[self.kind]
        return KIND[self.view.tap.kind]._replace(name=self.kind, axis="unit", view="own", through=self.view.tap.kind)

    @property
    def axis(self) -> str:
        """What its activation is divided into: "head", "kv head", "unit" or nothing ("")."""
        return "unit" if self.view is not None else KIND[self.kind].axis

    @property
    def part(self) -> int | None:
        """The head or the unit, whichever it has; None for all of them."""
        return self.unit if self.head is None else self.head

    @property
    def place(self) -> tuple[int, str]:
        """Where it is in a forward pass, as programs name it: (layer, kind), layer -1 where it has none."""
        return (-1 if self.layer is None else self.layer, self.kind)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read `L9.H6.z@-1`, `L3.neuron[5]`, a node name (`embed`, `L3.H2`, `L3.mlp`, `L3.H1.k`, `logits`), or a hook name
        of TransformerLens.

        Raises:
            SiteError: text of none of these forms.
        """
        if isinstance(text, Site):
            return text
        if text in ("hook_embed", "hook_logits"):
            return cls(text.removeprefix("hook_"))
        if hook := _HOOK.match(text):
            if hook[2] not in _HOOKS:
                raise SiteError(f"no site for hook {text!r}; known: blocks.N.{{{', '.join(_HOOKS)}}}")
            return cls(_HOOKS[hook[2]], layer=int(hook[1]))
        match = _TEXT.match(text)
        if not match:
            raise SiteError(
                f"cannot read site {text!r}; write e.g. 'L9.H6.z@-1', 'L5.resid_pre', 'L3.H2', 'L3.mlp', "
                "'embed', 'logits' or 'blocks.9.attn.hook_z'"
            )
        part: dict[str, Any] = {
            key: int(match[key]) if match[key] is not None else None for key in ("layer", "head", "unit", "position")
        }
        kind = match["bare"] or match["kind"] or ("head_out" if part["head"] is not None else None)
        if kind is None:
            raise SiteError(f"site {text!r} names a layer only; add a kind, e.g. '{text}.resid_pre'")
        return cls({"mlp": "mlp_out", "attn": "attn_out"}.get(kind, kind), **part)

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"L{self.layer}"]
        parts += [] if self.head is None else [f"H{self.head}"]
        text = ".".join([*parts, self.kind])
        text += "" if self.unit is None else f"[{self.unit}]"
        return text if self.position is None else f"{text}@{self.position}"

    @property
    def node(self) -> str:
        """The name of this site as a node of a circuit: `embed`, `L3.H2`, `L3.mlp`, `L3.H1.k`, `logits`; `@n` kept."""
        at = "" if self.position is None else f"@{self.position}"
        if self.kind == "head_out" and self.head is not None:
            return f"L{self.layer}.H{self.head}{at}"
        return f"L{self.layer}.mlp{at}" if self.kind == "mlp_out" else str(self)

    def overlaps(self, other: Site) -> bool:
        """Whether both name some of the same numbers: the same kind and layer, and no part in which they differ."""
        parts = ((self.head, other.head), (self.unit, other.unit), (self.position, other.position))
        if self.view is not other.view:  # a view and its tap, or two views of it: parts of one tensor
            taps = [site.kind if site.view is None else site.view.tap.kind for site in (self, other)]
            return (
                taps[0] == taps[1] and self.layer == other.layer and len({self.position, other.position} - {None}) < 2
            )
        same = self.place == other.place
        return same and all(a is None or b is None or a == b for a, b in parts)

    def at(self, **changes: int | None) -> Site:
        """The same site with some of layer, head, position or unit changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
