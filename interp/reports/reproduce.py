"""Code that does again what a record tells of: from its provenance alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..sites import KINDS

#: Metrics that have a public name.
METRICS = ("kl", "log_prob", "logit_diff", "prob", "rank")
#: A record: plain data, as JSON holds it.
Record = Mapping[str, Any]
#: What the name of a module is that was loaded by nobody here.
_CLASS = re.compile(r"[A-Z]\w*(LMHeadModel|ForCausalLM|ForConditionalGeneration|Model)")


def load_lines(record: Record) -> list[str]:
    """Loading the model; of one that was in memory, what to put in its place."""
    name, dtype = str(record.get("model", "")), record.get("dtype", "float32")
    if _CLASS.fullmatch(name):
        return [
            f"model = interp.load_model(module)  # the {name} that was in memory, with its tokenizer if there was one"
        ]
    more = f", dtype={dtype!r}" if dtype != "float32" else ""
    revision = record.get("revision")
    more += f", revision={revision!r}" if revision else ""
    return [f"model = interp.load_model({name!r}{more})"]


def pairs_lines(prompts: Record) -> list[str]:
    """The prompt pairs as token ids, whatever text they were written as."""
    parts = [f"    clean={prompts['clean']},"]
    for part in ("corrupted", "answers", "distractors"):
        if prompts.get(part) is not None:
            parts.append(f"    {part}={prompts[part]},")
    for part in ("positions", "answer_positions"):
        if prompts.get(part):
            parts.append(f"    {part}={prompts[part]},")
    name = f"    name={prompts['name']!r}," if prompts.get("name") else ""
    return ["pairs = interp.PromptPairs(", *parts, *([name] if name else []), ")"]


def plan_text(plan: Record) -> str:
    """A plan as the call that makes it; what cannot be written so stands in a comment."""
    axis, wanted = plan["axis"], {}
    if axis == "set":
        members = {name: [edit.split(" ", 1) for edit in edits] for name, edits in plan["members"].items()}
        plain = {name: [site for _, site in edits] for name, edits in members.items()}
        odd = sorted({op for edits in members.values() for op, _ in edits} - {"replace"})
        return f"interp.sets({plain})" + (f"  # with edits that {', '.join(odd)} a value of yours" if odd else "")
    maker, item = {"position": ("grid", ""), "head": ("heads", "heads"), "unit": ("neurons", "units")}[axis]
    components = plan["components"]
    first = repr(components[0] if len(components) == 1 else components)
    wanted["layer" if axis == "unit" else "layers"] = plan["layers"]
    if item:
        wanted[item] = plan["items"]
    if axis == "unit":
        wanted["component"], first = components[0] if len(components) == 1 else components, ""
    named = plan.get("named") or {}
    places = plan["positions"]
    if places is not None:
        places = {name: named[name] for name in places} if named else places
    wanted["positions"] = places
    views = [name for name in components if name not in KINDS]
    if views:  # a view is tensors and functions, which no record holds
        maker, first = ("features" if axis == "unit" else "grid"), "view"
        wanted = {"units": plan["items"], "positions": places} if axis == "unit" else {"positions": places}
    words = [first, *(f"{name}={value!r}" for name, value in wanted.items() if value is not None)]
    edit = f"  # view: {', '.join(views)}, which you gave" if views else ""
    edit += f"  # with {plan['edit']!r} by a value of yours: .with_edit(...)" if plan.get("edit") else ""
    return f"interp.{maker}({', '.join(filter(None, words))}){edit}"


def metric_words(record: Record, default: str) -> str:
    """`, metric=…` where it is not the method's own; a person's own function is named in a comment by `notes`."""
    name = record.get("metric")
    return f", metric=interp.{name}" if name in METRICS and name != default else ""


def effects_call(record: Record) -> list[str]:
    """The call that gave these effects."""
    method, _, kind = str(record.get("method", "")).partition(":")
    call = CALLS.get(method)
    if call is None:
        return [f"# the method {record.get('method')!r} has no call that can be written from its record"]
    lines = call(record, kind)
    name = record.get("metric")
    if name is not None and name not in METRICS:
        lines.insert(0, f"# metric: your own function {name!r}; give it as metric=")
    return lines


def _patch(record: Record, _: str) -> list[str]:
    more = metric_words(record, "logit_diff") + f", direction={record['direction']!r}"
    return [f"plan = {plan_text(record['plan'])}", f"effects = interp.patch(model, pairs, plan{more})"]


def _paths(record: Record, _: str) -> list[str]:
    plan = record["plan"]
    words = "".join(f", {name}=True" for name in ("together", "through_mlps") if plan.get(name))
    more = f"{words}{metric_words(record, 'logit_diff')}, direction={record['direction']!r}"
    return [
        f"effects = interp.path_patch(model, pairs, senders={plan['senders']}, receivers={plan['receivers']}{more})"
    ]


def _ablate(record: Record, _: str) -> list[str]:
    lines = [f"plan = {plan_text(record['plan'])}"]
    if record.get("reference_prompts") not in (None, "own"):
        lines.append("# the means were those of other prompts: give them as reference=")
    more = metric_words(record, "logit_diff")
    more += f", direction={record['direction']!r}" if record.get("direction") else ""
    more += f", seed={record['resample_seed']}" if record.get("resample_seed") else ""
    return [*lines, f"effects = interp.ablate(model, pairs, plan, mode={record.get('mode', 'zero')!r}{more})"]


def _attribute(record: Record, kind: str) -> list[str]:
    more = f", method={kind!r}" + metric_words(record, "logit_diff") + f", direction={record['direction']!r}"
    points, checked = record.get("points"), record.get("verification")
    more += f", points={points}" if points else ""
    more += f", verify={sum(cell['top'] for cell in checked['cells'])}" if checked else ""
    return [f"plan = {plan_text(record['plan'])}", f"effects = interp.attribute(model, pairs, plan{more})"]


def _trace(record: Record, _: str) -> list[str]:
    plan = record["plan"]
    more = f", noise={record['noise']}, samples={record['samples']}, window={record['window']}"
    more += f", components={plan['components']}" + (f", layers={plan['layers']}" if plan["layers"] is not None else "")
    more += f", seed={record['noise_seed']}" if record.get("noise_seed") else ""
    lines = []
    if "subject" not in record["prompts"].get("positions", {}):
        lines.append(f"# the subject stood at {record.get('subject')}")
    return [*lines, f"effects = interp.causal_trace(model, pairs{more}{metric_words(record, 'prob')})"]


def _direct(record: Record, _: str) -> list[str]:
    return [f"effects = interp.direct_effects(model, pairs, by={record['plan']['by']!r})"]


CALLS: dict[str, Callable[[Record, str], list[str]]] = {
    "patch": _patch,
    "path_patch": _paths,
    "ablate": _ablate,
    "attribute": _attribute,
    "causal_trace": _trace,
    "direct_effects": _direct,
}


def of_effects(record: Record) -> str:
    """Code that gives these effects again."""
    if not record.get("prompts"):
        return "# this record does not say of which prompts it is"
    return "\n".join(["import interp", "", *load_lines(record), *pairs_lines(record["prompts"]), *effects_call(record)])


def of_circuit(meta: Record) -> str:
    """Code that finds this circuit again."""
    if not meta.get("prompts"):
        return "# this circuit does not say of which prompts it is"
    lines = ["import interp", "", *load_lines(meta), *pairs_lines(meta["prompts"])]
    method, metric = str(meta.get("method", "")), metric_words(meta, "logit_diff")
    if meta.get("metric") not in METRICS:
        lines.append(f"# metric: your own function {meta.get('metric')!r}; give it as metric=")
    if method == "iterative_pruning":
        more = f"threshold={meta['threshold']}, ablation_type={meta['ablation']!r}{metric}"
        lines.append(f"circuit = interp.iterative_pruning(model, pairs=pairs, {more})")
    else:
        more = f", level={meta['level']!r}" if meta.get("level") != "edge" else ""
        more += metric + (f", points={meta['points']}" if meta.get("points") and method != "eap" else "")
        more += f", threshold={meta['threshold']}" if method == "acdc" else ""
        if meta.get("level") == "feature":
            more += ", saes=saes)  # the dictionaries that you gave"
        lines.append(f"circuit = interp.discover(model, pairs, {method!r}{more})".replace("))  #", ")  #"))
    for step in meta.get("selection", ()):
        size = next((name for name in ("n_edges", "n_nodes", "fraction") if name in step), None)
        more = ", connected=True" if step.get("connected") else ""
        if size is not None:
            lines.append(f"circuit = circuit.top({size}={step[size]}{more})")
        elif "threshold" in step:
            lines.append(f"circuit = circuit.threshold({step['threshold']}{more})")
    return "\n".join(lines)


def of_evaluation(record: Record, circuit: Record | None) -> str:
    """Code that evaluates a circuit again."""
    if not record.get("prompts"):
        return "# this evaluation does not say of which prompts it is"
    lines = ["import interp", "", *load_lines(record), *pairs_lines(record["prompts"])]
    if circuit is None or not circuit.get("prompts"):
        lines.append('circuit = interp.Circuit.from_json("circuit.json")  # the circuit that you had')
    else:
        own = of_circuit(circuit).splitlines()
        at = next(number for number, line in enumerate(own) if line.startswith("pairs = "))
        lines += [line.replace("pairs", "found_on") for line in own[at:]]
    more = f"ablation={record['ablation']!r}{metric_words(record, 'logit_diff')}"
    more += f", fractions={record['fractions']}" if record.get("fractions") else ""
    return "\n".join([*lines, f"evaluation = interp.evaluate_circuit(model, pairs, circuit, {more})"])
