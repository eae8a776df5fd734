"""What can be asked of `discover` together: methods, levels, and the options of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..attribution import RULED, between
from ..engine.slopes import midpoints
from ..errors import CircuitError
from ..options import RunOptions
from ..pairs import PromptPairs
from ..saes.library import Dictionary

LEVELS = ("edge", "node", "feature", "neuron")
METHODS = ("eap", "eap-ig", "eap-ig-activations", "secant", "relp", "exact", "acdc")
#: Methods that patch instead of taking gradients.
PATCHING = ("exact", "acdc")
#: Edges by secants: the way in two parts, as one does not see a query and a key that change together.
HALVES = (0.5,)
#: What only some methods use; elsewhere it is refused rather than left aside.
OPTIONS = {"within": PATCHING, "threshold": ("acdc",), "checkpoint": PATCHING}
#: Options that only some levels use, and the methods of levels that do not have all.
OF_LEVEL = {"saes": ("feature",), "top": ("feature", "neuron"), "patterns": ("neuron",)}
SCORED_BY = {"feature": ("eap", "eap-ig"), "neuron": ("eap", "eap-ig", *RULED)}


class DiscoverOptions(RunOptions, total=False):
    """The keyword options of `discover`."""

    saes: Sequence[Dictionary]
    top: int
    patterns: str


def check_request(
    method: str, level: str, pairs: PromptPairs, used: Mapping[str, object], options: DiscoverOptions
) -> None:
    """Refuse what cannot be asked together, or an option that would be left aside."""
    if method not in METHODS:
        raise CircuitError(f"unknown method {method!r}; the methods are: {', '.join(METHODS)}")
    if level not in LEVELS:
        raise CircuitError(f"unknown level {level!r}; it is {', '.join(map(repr, LEVELS))}")
    if method == "acdc" and level == "node":
        raise CircuitError("acdc removes edges; for nodes use iterative_pruning, or method='exact'")
    if level in SCORED_BY and method not in SCORED_BY[level]:
        ways = " or ".join(map(repr, SCORED_BY[level]))
        raise CircuitError(f"{level}s are scored by {ways}, not by {method!r}")
    if pairs.corrupted is None:
        raise CircuitError("discover corrupts edges: give PromptPairs(corrupted=[...])")
    for name, methods in OPTIONS.items():
        if used[name] is not None and method not in methods:
            raise CircuitError(f"{name}= is of no use to method={method!r}; it goes with {' and '.join(methods)}")
    for name, levels in OF_LEVEL.items():
        if options.get(name) is not None and level not in levels:
            ways = " or ".join(f"level={one!r}" for one in levels)
            raise CircuitError(f"{name}= is of no use at level={level!r}; it goes with {ways}")
    if (patterns := options.get("patterns", "moving")) not in ("moving", "held"):
        raise CircuitError(f"patterns={patterns!r}; it is 'moving' or 'held'")


def points_of(method: str, steps: int, points: Sequence[float] | None) -> tuple[float, ...]:
    """The inputs between the two runs that a method looks at. CircuitError: none for a method that needs some."""
    if method == "eap":
        return ()
    if method in RULED:
        return HALVES if points is None and method == "secant" else between(points)
    alphas = tuple(points) if points is not None else midpoints(max(0, steps))
    if not alphas:
        raise CircuitError(f"{method} needs interpolation points: steps={steps}, points={points}; give 1 or more")
    return alphas
