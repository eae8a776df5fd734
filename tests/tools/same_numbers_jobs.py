"""The jobs of `same_numbers`: `python same_numbers_jobs.py OUT whole|quick`, on whatever tree PYTHONPATH names.

Public names of the library alone, so that it runs on revisions before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import interp
from interp.circuits import run_circuit
from interp.lens import attention_patterns
from tests.families import loaded, words

out, quick = sys.argv[1], sys.argv[2] == "quick"
numbers = {}


def keep(name: str, value: Any) -> None:
    """One job's numbers; of effects also the unpatched runs, of a circuit which edges it has."""
    if hasattr(value, "values") and hasattr(value, "clean"):  # Effects
        runs = [run.values for run in (value.clean, value.corrupted) if run is not None]
        keep(f"{name}: runs", np.stack(runs))
        value = value.values.values
    if isinstance(value, interp.Circuit):
        keep(f"{name}: kept", value.matrix().astype(float))
        value = list(value.scores().values())
    value = value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, dtype=float)
    numbers[name] = value
    print(name, value.shape, file=sys.stderr, flush=True)


def jobs(name: str, model: interp.Model, pairs: interp.PromptPairs, layers: Sequence[int], small: bool) -> None:
    """Every method once."""

    def own(job: str) -> str:
        return f"{name}: {job}"

    last = layers[-1]
    schedules = ("auto", "naive", "rows", "growing", "prefix") if small else ("auto",)
    grid = interp.grid(["resid_pre", "attn_out", "mlp_out"], layers=layers)
    for direction in ("noising", "denoising"):
        for schedule in schedules:
            effects = interp.patch(model, pairs, grid, direction=direction, schedule=schedule)
            keep(own(f"patch grid {direction} {schedule}"), effects)
        for kinds in (["z", "q", "pattern", "head_out"], ["k", "v"]):
            effects = interp.patch(model, pairs, interp.heads(kinds, layers=layers), direction=direction)
            keep(own(f"patch heads {' '.join(kinds)} {direction}"), effects)
    sets = interp.sets({"a": [f"L{last}.H0.z", f"L{last}.mlp@-1"], "b": ["L0.H1.k", "embed"]})
    keep(own("patch sets"), interp.patch(model, pairs, sets))
    keep(own("patch neurons"), interp.patch(model, pairs, interp.neurons(last, units=range(12))))
    keep(own("patch embed"), interp.patch(model, pairs, interp.grid(["embed", "resid_post"], layers=[0])))
    for method in ("atp", "atp*", "ig", "ig-activations"):
        options = {"method": method, "steps": 3}
        plan = interp.grid(["resid_pre", "mlp_out"], layers=layers)
        keep(own(f"attribute {method}"), interp.attribute(model, pairs, plan, verify=4, **options))
        plan = interp.heads(["z", "q", "head_out"], layers=layers)
        keep(own(f"attribute heads {method}"), interp.attribute(model, pairs, plan, **options))
    senders = ["embed", "L0.H1", f"L{last - 1}.mlp", f"L{last - 1}.H0@-1"]
    for through in (False, True):
        receivers = [f"L{last}.H0.q", f"L{last}.H0.v", f"L{last}.mlp", "logits"]
        effects = interp.path_patch(model, pairs, senders, receivers, through_mlps=through)
        keep(own(f"path_patch through_mlps={through}"), effects)
    for mode in ("zero", "mean", "positional_mean", "resample"):
        others = None if mode == "zero" else [*pairs.clean, *pairs.corrupted]
        plan = interp.heads(["z", "head_out"], layers=layers)
        keep(own(f"ablate {mode}"), interp.ablate(model, pairs, plan, mode, others))
        keep(
            own(f"ablate mlp {mode}"), interp.ablate(model, pairs, interp.grid("mlp_out", layers=layers), mode, others)
        )
    traced = {"samples": 2, "window": 2, "components": ["resid_post", "mlp_out"], "layers": layers}
    keep(own("causal_trace"), interp.causal_trace(model, pairs, **traced))
    for method in ("eap", "eap-ig", "eap-ig-activations") if small else ("eap", "eap-ig"):
        keep(own(f"discover {method}"), interp.discover(model, pairs, method, steps=2, progress=False))
    circuit = interp.discover(model, pairs, "eap", progress=False).top(n_edges=30)
    keep(own("discover exact"), interp.discover(model, pairs, "exact", within=circuit, progress=False))
    keep(own("discover acdc"), interp.discover(model, pairs, "acdc", within=circuit, progress=False))
    for ablation in ("counterfactual", "mean", "zero"):
        keep(own(f"run_circuit {ablation}"), run_circuit(model, pairs, circuit, ablation))
    scored = interp.discover(model, pairs, "eap", progress=False)
    found = interp.evaluate_circuit(model, pairs, scored, fractions=(0.01, 0.1, 1.0))
    keep(own("evaluate_circuit"), found.curve[["metric", "faithfulness"]].to_numpy())
    if small:
        keep(own("discover exact nodes"), interp.discover(model, pairs, "exact", level="node", progress=False))
        for kind in ("mean", "zero", "counterfactual"):
            options = {"ablation_type": kind, "threshold": 0.05, "progress": False}
            keep(own(f"iterative_pruning {kind}"), interp.iterative_pruning(model, pairs=pairs, **options))
    for kind in ("resid_post", "z", "k", "head_out", "mlp_pre", "neuron", "embed"):
        keep(own(f"collect {kind}"), interp.collect_activations(model, pairs, last, kind))
    lens = interp.logit_lens(model, pairs, layers=layers)
    for name_ in ("token", "logit", "next_rank", "next_probability"):
        keep(own(f"logit_lens {name_}"), np.nan_to_num(lens[name_].values))
    for by in ("component", "head", "position"):
        keep(own(f"direct_effects {by}"), interp.direct_effects(model, pairs, by))
    keep(own("attention_patterns"), attention_patterns(model, pairs.clean[0], layers=layers).values)


def _ioi(model: interp.Model) -> interp.PromptPairs:
    """Two pairs of the bundled task, whose subject is named for causal tracing."""
    pairs = interp.tasks.ioi(model.tokenizer, n=2, seed=0)
    sets = (pairs.answers, pairs.distractors)
    return interp.PromptPairs(pairs.clean, pairs.corrupted, *sets, positions={"subject": [[2, 3]] * 2})


for family in ("gpt2", "llama_gqa"):
    clean = words(7, 7, 5)
    corrupted = [[p[0], 99 - p[1] % 50, *p[2:]] for p in clean]
    pairs = interp.PromptPairs(clean, corrupted, [20, 21, 22], [40, 41, 42], positions={"subject": [[1, 2]] * 3})
    alike = interp.PromptPairs(clean[:2], corrupted[:2], [20, 21], [40, 41], positions={"subject": [[1, 2]] * 2})
    model = loaded(family)
    jobs(family, model, alike, [0, 1, 2], True)
    keep(f"{family}: padded", interp.patch(model, pairs, interp.grid(["resid_mid", "resid_post"])))
    keep(
        f"{family}: padded gradients",
        interp.attribute(model, pairs, interp.grid(["resid_mid", "mlp_out"]), method="ig"),
    )
    keep(f"{family}: padded edges", interp.discover(model, pairs, "eap-ig", progress=False))
if not quick:
    model = interp.load_model("smollm2-135m")
    model.hf.requires_grad_(False)  # 137d0c9 cannot attribute heads' outputs where weights want gradients
    jobs("smollm2-135m", model, _ioi(model), [3, 14, 29], False)
np.savez(out, **numbers)
