"""The circuit of indirect object identification: found in four ways, evaluated, drawn.

    python recipes/ioi_circuit.py                          # the bundled model, 32 pairs
    python recipes/ioi_circuit.py --model gpt2 --n 64 --steps 10 --device cuda

The same as `interp circuit`. The core of it, in Python:

    pairs = interp.tasks.ioi(model.tokenizer, n=32, template=0, order="ABBA")
    ranking = interp.discover(model, pairs, "eap-ig", steps=5)
    curve = interp.evaluate_circuit(model, pairs, ranking)
    circuit = ranking.top(n_edges=1400, connected=True)
    interp.report([("Faithfulness", curve), ("The circuit", circuit)], "index.html", title="Indirect objects")
"""

from __future__ import annotations

from pathlib import Path

import interp


def main(arguments: list[str] | None = None) -> Path:
    """Run the study; the folder that holds its results."""
    return interp.cli.call("circuit", arguments)


if __name__ == "__main__":
    main()
