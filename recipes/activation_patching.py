"""Activation patching of one language model: a study of a task, of its heads, and of one fact.

    python recipes/activation_patching.py                                  # the bundled model, indirect objects
    python recipes/activation_patching.py --task greater_than --n 16 --components resid_mid mlp_out
    python recipes/activation_patching.py --model gpt2-medium --device cuda --direction denoising

The same as `interp patch`. What it does, in Python:

    model = interp.load_model("smollm2-135m")
    pairs = interp.studies.aligned_pairs(model, "ioi", n=8, seed=0)
    grid = interp.patch(model, pairs, interp.grid(["resid_pre", "attn_out", "mlp_out"]))
    heads = interp.patch(model, pairs, interp.heads("z"))
    fact = interp.comprehensive_activation_patching(model, clean_prompt="The Eiffel Tower is in the city of", ...)
    interp.report([("Indirect objects", grid), ("Heads", heads), ("One fact", fact)], "index.html", title="A study")
"""

from __future__ import annotations

from pathlib import Path

import interp


def main(arguments: list[str] | None = None) -> Path:
    """Run the study; the folder that holds its results."""
    return interp.cli.call("patch", arguments)


if __name__ == "__main__":
    main()
