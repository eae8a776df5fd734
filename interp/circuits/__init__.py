"""Circuits: parts of a model as graphs of Sites, in memory and in files."""

from .circuit import Circuit
from .eap_ig import from_eap_ig, to_eap_ig
from .formats import from_graphml, from_json, to_graphml, to_json
from .nodes import Facts

__all__ = [
    "Circuit",
    "Facts",
    "from_eap_ig",
    "from_graphml",
    "from_json",
    "to_eap_ig",
    "to_graphml",
    "to_json",
]
