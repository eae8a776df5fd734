"""Circuits: found, pruned, run with all else cut, evaluated; as graphs of Sites, in memory and in files."""

from .attribution_graph import attribution_graph
from .circuit import Circuit
from .compare import compare_circuits, stability
from .discovery import discover
from .eap_ig import from_eap_ig, to_eap_ig
from .faithfulness import Evaluation, evaluate_circuit
from .features import FeatureCircuit
from .formats import from_graphml, from_json, to_graphml, to_json
from .neurons import NeuronCircuit
from .nodes import Facts
from .prompt_graph import AttributionGraph
from .pruning import iterative_pruning
from .runs import run_circuit

__all__ = [
    "AttributionGraph",
    "Circuit",
    "Evaluation",
    "Facts",
    "FeatureCircuit",
    "NeuronCircuit",
    "attribution_graph",
    "compare_circuits",
    "discover",
    "evaluate_circuit",
    "from_eap_ig",
    "from_graphml",
    "from_json",
    "iterative_pruning",
    "run_circuit",
    "stability",
    "to_eap_ig",
    "to_graphml",
    "to_json",
]
