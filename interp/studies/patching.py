"""Activation patching of one model: a task by component, layer and position; its heads; one fact the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import tasks
from ..effects import Effects
from ..errors import InterpError, PairsError, TaskError
from ..lens import attention_patterns
from ..models.model import Model
from ..pairs import PromptPairs
from ..patching import comprehensive_activation_patching, patch
from ..plan import Plan, grid, heads
from ..plots import plot_activation_patching_results, plot_attention
from .folder import Folder

#: The tasks, and what makes all prompts of one alike, so that a position means the same in every pair.
ALIGNED: dict[str, dict[str, object]] = {
    "ioi": {"template": 0, "order": "ABBA"},
    "facts": {},
    "greater_than": {"template": 0},
    "pronouns": {"template": 0},
    "agreement": {"template": 0},
    "induction": {},
}
FACT = ("The Eiffel Tower is in the city of", "The Colosseum is in the city of", (" Paris", " Rome"))
COMPONENTS = ("resid_pre", "attn_out", "mlp_out")
TOP = 5
SHOWN = 4  # heads whose attention is drawn


def patching_study(
    model: Model,
    out: str | Path,
    *,
    task: str = "ioi",
    n: int = 8,
    seed: int = 0,
    components: Sequence[str] = COMPONENTS,
    direction: str = "noising",
    schedule: str = "auto",
) -> Path:
    """Patch a task's pairs at every layer and position, every head, and one fact the same way; the folder.

    Written to `out`: effects (grid.nc, heads.nc, fact.nc), a page and, where there is Chromium, a picture of each, one of what
    the four strongest heads attend to (attention), summary.md, and the report index.html.

    Args:
        task: one of `ALIGNED`. n: pairs of prompts. components: kinds of sites that have positions.

    Raises:
        TaskError: no such task, or too few pairs for this tokenizer. SiteError, PlanError: components that cannot be patched.
    """
    folder = Folder(model, Path(out), f"Activation patching · {model.name}")
    base, source = ("clean", "corrupted") if direction == "noising" else ("corrupted", "clean")
    said = (
        f"Effects ({direction}): the {base} run with activations of the {source} run; 0 = nothing moved, 1 = became the "
        f"{source} run. Intervals: 95 %, bootstrap over pairs."
    )
    about = f"{model!r}" + (f", {model.note}" if model.note else "")
    folder.lines.extend([about, said, ""])
    pairs = aligned_pairs(model, task, n, seed)
    folder.out.mkdir(parents=True, exist_ok=True)

    def run(name: str, title: str, plan: Plan) -> Effects:
        effects = folder.timed(
            name,
            lambda: patch(model, pairs, plan, direction=direction, schedule=schedule),
            **COUNTS,  # type: ignore[arg-type]
        )
        keep(folder, name, title, effects)
        return effects

    effects = run("grid", f"{task}: components by layer and position", grid(list(components)))
    describe(folder, f"{task}: layers × positions", effects, position_names(model, pairs))
    effects = run("heads", f"{task}: attention heads", heads("z"))
    describe(folder, f"{task}: heads", effects, {})
    show_attention(folder, pairs.clean[0], effects)

    fact = fact_pair(model)
    effects = folder.timed(
        "fact",
        lambda: comprehensive_activation_patching(
            model,
            clean_prompt=fact.clean[0],
            corrupted_prompt=fact.corrupted[0],  # type: ignore[index]
            answer_tokens=[fact.answers[0][0], fact.distractors[0][0]],  # type: ignore[index]
            components=list(components),
            direction=direction,
            schedule=schedule,
        ),
        **COUNTS,
    )
    keep(folder, "fact", "One fact: components by layer and position", effects)
    prompts = " / ".join(f'"{prompt}"' for prompt in (fact.clean[0], fact.corrupted[0]))  # type: ignore[index]
    describe(folder, f"One fact: {prompts}", effects, position_names(model, fact))
    return folder.finish([f"{about}. {said}"])


#: What is said of each step's effects beside its time.
COUNTS = {
    "patches": lambda effects: int(effects.values.notnull().sum()),
    "forward passes": lambda effects: effects.provenance["forwards"],
}


def keep(folder: Folder, name: str, title: str, effects: Effects) -> None:
    """Write effects and what is drawn of them."""
    effects.save(folder.out / f"{name}.nc")
    folder.draw(name, plot_activation_patching_results(effects, title=f"{title} · {folder.model.name}"))
    folder.show(title, effects)


def aligned_pairs(model: Model, task: str, n: int, seed: int) -> PromptPairs:
    """`n` pairs of a task whose prompts all have the same number of tokens: the commonest among four times as many.

    Raises:
        TaskError: no such task, or too few pairs for this tokenizer.
    """
    if task not in ALIGNED:
        raise TaskError(f"no task {task!r}; there are {', '.join(ALIGNED)}")
    build = getattr(tasks, task)
    pairs: PromptPairs = build(model.tokenizer, n=4 * n if task == "facts" else n, seed=seed, **ALIGNED[task])
    lengths = [len(prompt) for prompt in model.encode(pairs).clean]
    commonest = Counter(lengths).most_common(1)[0][0]
    return pairs[[i for i, length in enumerate(lengths) if length == commonest][:n]]


def fact_pair(model: Model) -> PromptPairs:
    """The landmark's fact on this model, or the first of `tasks.facts` that fits its tokenizer."""
    right, wrong = FACT[2]
    pairs = PromptPairs([FACT[0]], [FACT[1]], [right], [wrong], name="fact")
    try:
        if not model.encode(pairs).aligned:
            raise PairsError("the two landmarks have different numbers of tokens")
    except InterpError as reason:
        print(f"fact: {reason}; taking a fact that fits this tokenizer")
        return tasks.facts(model.tokenizer, n=1, relation="landmark")
    return pairs


def position_names(model: Model, pairs: PromptPairs) -> dict[int, str]:
    """What a reader calls each position: its token where all pairs agree, and the task's name for it."""
    encoded = model.encode(pairs)
    named: dict[int, str] = {}
    for name, places in encoded.positions.items():
        for place in {places[0][0]} if len(set(places)) == 1 else ():
            named.update({position: f"[{name}]" for position in place})
    tokens = zip(*encoded.labels, strict=False)  # [position][pair]
    agreed = [repr(seen[0]) if len(set(seen)) == 1 else "" for seen in tokens]
    return {p: f"{token} {named.get(p, '')}".strip() or "…" for p, token in enumerate(agreed)}


def strongest(effects: Effects, component: str, names: dict[int, str]) -> list[str]:
    """The cells with the largest mean normalised effect, with 95 % intervals over pairs."""
    spread = effects.interval(normalized=True).sel(component=component, drop=True)
    cells = spread.stack(cell=spread["mean"].dims)
    order = abs(cells["mean"]).fillna(0).argsort()[::-1][:TOP]
    found = []
    for index in order.values:
        layer, place = cells.indexes["cell"][index]
        where = f"L{layer}.H{place}" if "head" in spread.dims else f"layer {layer}, {place} {names.get(place, '')}"
        mean, low, high = (float(cells[part][index]) for part in ("mean", "low", "high"))
        found.append(f"{where}: {mean:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if low == low else ""))
    return found


def carriers(effects: Effects, component: str, names: dict[int, str]) -> list[str]:
    """At which layers a position of the residual stream carries more than half of the effect."""
    mean = effects.mean(normalized=True).sel(component=component)
    found = []
    for position in mean["position"].values.tolist():
        layers = mean["layer"].values[(mean.sel(position=position) > 0.5).values].tolist()
        if layers:
            found.append(f"{position} {names.get(position, '')}: layers {layers[0]} to {layers[-1]}")
    return found


def describe(folder: Folder, title: str, effects: Effects, names: dict[int, str]) -> None:
    """A section of the summary: the two unpatched runs, and the strongest cells of every component."""
    metric, n = effects.provenance["metric"], effects.values.sizes["pair"]
    clean = float(effects.clean.mean())
    corrupted = float(effects.corrupted.mean()) if effects.corrupted is not None else float("nan")
    runs = f"{n} pair{'s' * (n > 1)}; {metric}: clean {clean:.2f}, corrupted {corrupted:.2f}."
    folder.lines.extend([f"## {title}", "", runs, ""])
    for component in effects.values["component"].values.tolist():
        stream = component.startswith("resid")
        found = carriers(effects, component, names) if stream else strongest(effects, component, names)
        what = "more than half of the effect at" if stream else "strongest"
        folder.lines.append(f"- `{component}`, {what}: {'; '.join(found) or 'nowhere'}")
    folder.lines.append("")


def show_attention(folder: Folder, prompt: str | tuple[int, ...], effects: Effects) -> None:
    """What the heads with the largest effects attend to on one clean prompt."""
    size = abs(effects.mean(normalized=True).squeeze("component", drop=True)).stack(head_of=("layer", "head"))
    chosen = [size.indexes["head_of"][index] for index in size.argsort()[::-1][:SHOWN].values]
    patterns = attention_patterns(folder.model, prompt, layers=sorted({layer for layer, _ in chosen}))
    title = f"What the {SHOWN} strongest heads attend to"
    figure = plot_attention(patterns, heads=chosen, title=f"{title} · {folder.model.name}")
    folder.draw("attention", figure)
    folder.show(f"{title}, on {prompt!r}", figure)
