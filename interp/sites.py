"""Sites: named places in a transformer where an activation can be read or written.

Standard library only; sites also travel to a remote server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import SiteError

#: Every kind of site, in the order in which a forward pass reaches them inside a block.
KINDS = (
    "embed", "resid_pre", "q", "k", "v", "q_rot", "k_rot", "pattern", "z", "head_out", "attn_out",
    "resid_mid", "mlp_pre", "neuron", "mlp_out", "resid_post", "logits",
)  # fmt: skip
#: Kinds in tables that travel: also what an MLP receives behind its norm, which only paths and circuits write.
TABLE_KINDS = (*KINDS, "mlp_in")
#: Kinds whose activation has a head axis; k, v and k_rot are counted by key/value head.
HEAD_KINDS = ("q", "k", "v", "q_rot", "k_rot", "pattern", "z", "head_out")
KV_KINDS = ("k", "v", "k_rot")
UNIT_KINDS = ("mlp_pre", "neuron")
LAYERLESS = ("embed", "logits")
#: Kinds that are read and written through others.
MADE_FROM = {"head_out": ("z",), "pattern": ("z",)}

_TEXT = re.compile(
    r"^(?:L(?P<layer>-?\d+)(?:\.H(?P<head>\d+))?(?:\.(?P<kind>[a-z_]+))?|(?P<bare>embed|logits))"
    r"(?:\[(?P<unit>\d+)\])?(?:@(?P<position>-?\d+))?$"
)
_HOOKS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v", "attn.hook_rot_q": "q_rot",
    "attn.hook_rot_k": "k_rot", "attn.hook_z": "z", "attn.hook_pattern": "pattern",
    "attn.hook_result": "head_out", "mlp.hook_pre": "mlp_pre", "mlp.hook_post": "neuron",
}  # fmt: skip
_HOOK = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Site:
    """One place in the model: a kind, and optionally layer, head, position and unit.

    Layers and positions count from 0, negative from the end. A head, position or unit left out means all of
    them. `Site("z", layer=9, head=6, position=-1)` and `Site.parse("L9.H6.z@-1")` are the same site.

    Raises:
        SiteError: an unknown kind, or a layer, head or unit on a kind that has none.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    unit: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(f"unknown site kind {self.kind!r}; the kinds are: {', '.join(KINDS)}")
        if self.kind in LAYERLESS and self.layer is not None:
            raise SiteError(f"site {self.kind!r} has no layer, but layer={self.layer} was given")
        if self.head is not None and self.kind not in HEAD_KINDS:
            raise SiteError(f"site {self.kind!r} has no heads; kinds with heads are: {', '.join(HEAD_KINDS)}")
        if self.unit is not None and self.kind not in UNIT_KINDS:
            raise SiteError(f"site {self.kind!r} has no units; kinds with units are: {', '.join(UNIT_KINDS)}")

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
        found = _TEXT.match(text)
        if not found:
            raise SiteError(
                f"cannot read site {text!r}; write e.g. 'L9.H6.z@-1', 'L5.resid_pre', 'L3.H2', 'L3.mlp', "
                "'embed', 'logits' or 'blocks.9.attn.hook_z'"
            )
        part = {
            key: int(found[key]) if found[key] is not None else None for key in ("layer", "head", "unit", "position")
        }
        kind = found["bare"] or found["kind"] or ("head_out" if part["head"] is not None else None)
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
        same = (self.kind, self.layer) == (other.kind, other.layer)
        return same and all(a is None or b is None or a == b for a, b in parts)

    def at(self, **changes: int | None) -> Site:
        """The same site with some of layer, head, position or unit changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
