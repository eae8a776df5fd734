"""Activation patching of one language model: a study of a task, of its heads, and of one fact.

    python recipes/activation_patching.py                                  # the bundled model, indirect objects
    python recipes/activation_patching.py --task greater_than --n 16 --components resid_mid mlp_out
    python recipes/activation_patching.py --model gpt2-medium --device cuda --direction denoising

Three experiments, each written as effects (.nc), a page (.html) and, where Chromium is installed, a picture (.png):

    grid        every component at every layer and position, mean over the task's pairs
    heads       every attention head at every layer, all positions at once
    fact        the same grid for one pair of prompts: the city of the Eiffel Tower against that of the Colosseum

and a page of what the four strongest heads attend to, attention.html.

A summary with the strongest cells and the times stands in summary.md and is printed; index.html links all pages.
"""

from __future__ import annotations

import argparse
import html
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import interp

#: What makes all prompts of a task alike, so that a position means the same in every pair.
ALIGNED = {
    "ioi": {"template": 0, "order": "ABBA"},
    "facts": {},
    "greater_than": {"template": 0},
    "pronouns": {"template": 0},
    "agreement": {"template": 0},
    "induction": {},
}
FACT = ("The Eiffel Tower is in the city of", "The Colosseum is in the city of", [" Paris", " Rome"])
TOP = 5
SHOWN = 4  # heads whose attention is drawn


@dataclass
class Study:
    """One model under study: where results go, and what was measured on the way."""

    model: interp.Model
    out: Path
    lines: list[str] = field(default_factory=list)
    pages: list[tuple[str, str, str]] = field(default_factory=list)  # (name, title, one line)
    times: list[tuple[str, float, int, int]] = field(default_factory=list)  # (name, seconds, patches, forwards)

    def run(self, name: str, experiment, *arguments, **options) -> interp.Effects:
        """One experiment, timed."""
        print(f"{name}: patching …", flush=True)
        start = time.perf_counter()
        effects = experiment(self.model, *arguments, **options)
        patches = int(effects.values.notnull().sum())
        self.times.append((name, time.perf_counter() - start, patches, effects.provenance["forwards"]))
        return effects

    def keep(self, name: str, title: str, effects: interp.Effects) -> None:
        """Write effects and what is drawn of them."""
        effects.save(self.out / f"{name}.nc")
        figure = interp.plot_activation_patching_results(effects, title=f"{title} · {self.model.name}")
        self.draw(name, title, repr(effects), figure)

    def draw(self, name: str, title: str, line: str, figure: interp.plots.Figure) -> None:
        """Write a page and, if there is a browser, a picture."""
        figure.save(self.out / f"{name}.html")
        try:
            figure.save(self.out / f"{name}.png")
        except interp.errors.PlotError as error:
            print(f"{name}: no picture beside the page: {error}")
        self.pages.append((name, title, line))


def aligned_pairs(model: interp.Model, task: str, n: int, seed: int) -> interp.PromptPairs:
    """`n` pairs of a task whose prompts all have the same number of tokens: the commonest among four times as many."""
    build = getattr(interp.tasks, task)
    pairs = build(model.tokenizer, n=4 * n if task == "facts" else n, seed=seed, **ALIGNED[task])
    lengths = [len(prompt) for prompt in model.encode(pairs).clean]
    commonest = Counter(lengths).most_common(1)[0][0]
    return pairs[[i for i, length in enumerate(lengths) if length == commonest][:n]]


def position_names(model: interp.Model, pairs: interp.PromptPairs) -> dict[int, str]:
    """What a reader calls each position: its token where all pairs agree, and the task's name for it."""
    encoded = model.encode(pairs)
    named = {}
    for name, places in encoded.positions.items():
        for place in {places[0][0]} if len(set(places)) == 1 else ():
            named.update({position: f"[{name}]" for position in place})
    tokens = zip(*encoded.labels, strict=False)  # [position][pair]
    agreed = [repr(seen[0]) if len(set(seen)) == 1 else "" for seen in tokens]
    return {p: f"{token} {named.get(p, '')}".strip() or "…" for p, token in enumerate(agreed)}


def strongest(effects: interp.Effects, component: str, names: dict[int, str]) -> list[str]:
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


def carriers(effects: interp.Effects, component: str, names: dict[int, str]) -> list[str]:
    """At which layers a position of the residual stream carries more than half of the effect."""
    mean = effects.mean(normalized=True).sel(component=component)
    found = []
    for position in mean["position"].values.tolist():
        layers = mean["layer"].values[(mean.sel(position=position) > 0.5).values].tolist()
        if layers:
            found.append(f"{position} {names.get(position, '')}: layers {layers[0]} to {layers[-1]}")
    return found


def describe(study: Study, title: str, effects: interp.Effects, names: dict[int, str]) -> None:
    """A section of the summary: the two unpatched runs, and the strongest cells of every component."""
    metric, n = effects.provenance["metric"], effects.values.sizes["pair"]
    clean, corrupted = float(effects.clean.mean()), float(effects.corrupted.mean())
    study.lines += [
        f"## {title}",
        "",
        f"{n} pair{'s' * (n > 1)}; {metric}: clean {clean:.2f}, corrupted {corrupted:.2f}.",
        "",
    ]
    for component in effects.values["component"].values.tolist():
        stream = component.startswith("resid")
        found = carriers(effects, component, names) if stream else strongest(effects, component, names)
        what = "more than half of the effect at" if stream else "strongest"
        study.lines += [f"- `{component}`, {what}: {'; '.join(found) or 'nowhere'}"]
    study.lines.append("")


def fact_effects(study: Study, components: list[str], options: dict) -> tuple[interp.Effects, interp.PromptPairs]:
    """The landmark's fact on this model, or the first of `tasks.facts` that fits its tokenizer."""
    right, wrong = FACT[2]
    pairs = interp.PromptPairs([FACT[0]], [FACT[1]], [right], [wrong], name="fact")
    try:
        if not study.model.encode(pairs).aligned:
            raise interp.errors.PairsError("the two landmarks have different numbers of tokens")
    except interp.errors.InterpError as reason:
        print(f"fact: {reason}; taking a fact that fits this tokenizer")
        pairs = interp.tasks.facts(study.model.tokenizer, n=1, relation="landmark")
    effects = study.run(
        "fact",
        interp.comprehensive_activation_patching,
        clean_prompt=pairs.clean[0],
        corrupted_prompt=pairs.corrupted[0],
        answer_tokens=[pairs.answers[0][0], pairs.distractors[0][0]],
        components=components,
        **options,
    )
    return effects, pairs


def show_attention(study: Study, prompt: str | tuple[int, ...], effects: interp.Effects) -> None:
    """What the heads with the largest effects attend to on one clean prompt."""
    size = abs(effects.mean(normalized=True).squeeze("component", drop=True)).stack(head_of=("layer", "head"))
    heads = [size.indexes["head_of"][index] for index in size.argsort()[::-1][:SHOWN].values]
    patterns = interp.lens.attention_patterns(study.model, prompt)
    title = f"What the {SHOWN} strongest heads attend to"
    figure = interp.plot_attention(patterns, heads=heads, title=f"{title} · {study.model.name}")
    study.draw("attention", title, f"on {prompt!r}", figure)


def write_summary(study: Study, loading: float) -> str:
    """summary.md and index.html; the summary as text."""
    patching = sum(seconds for _, seconds, _, _ in study.times)
    table = ["## Times", "", "| step | seconds | patches | forward passes |", "| - | -: | -: | -: |"]
    table += [f"| {name} | {seconds:.1f} | {patches} | {passes} |" for name, seconds, patches, passes in study.times]
    table += [
        f"| **patching** | **{patching:.1f}** | {sum(t[2] for t in study.times)} | {sum(t[3] for t in study.times)} |"
    ]
    table += [f"| loading the model | {loading:.1f} | | |", ""]
    files = sorted({*(path.name for path in study.out.iterdir()), "index.html", "summary.md"})
    text = "\n".join([*study.lines, *table, "## Files", "", *(f"- {name}" for name in files), ""])
    (study.out / "summary.md").write_text(text, encoding="utf-8")
    items = []
    for name, title, line in study.pages:
        picture = f'<br><img src="{name}.png" alt="">' if (study.out / f"{name}.png").exists() else ""
        items.append(f'<li><a href="{name}.html">{html.escape(title)}{picture}</a><p>{html.escape(line)}</p></li>')
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<title>Activation patching · {html.escape(study.model.name)}</title>
<style>body {{ font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; margin: 28px; max-width: 1240px }}
ul {{ list-style: none; padding: 0 }} a {{ font-weight: 600 }} p {{ color: #6b6b6b; margin: 2px 0 26px }}
img {{ max-width: 820px; max-height: 420px; border: 1px solid #ddd }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 14px }}</style></head>
<body><h1>Activation patching · {html.escape(study.model.name)}</h1>
<ul>{"".join(items)}</ul><pre>{html.escape(text)}</pre></body></html>"""
    (study.out / "index.html").write_text(page, encoding="utf-8")
    return text


def main(arguments: list[str] | None = None) -> Path:
    """Run the study; the folder that holds its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, local folder or bundled name")
    parser.add_argument("--task", default="ioi", choices=sorted(ALIGNED))
    parser.add_argument("--n", type=int, default=8, help="pairs of prompts (default 8)")
    parser.add_argument("--components", nargs="+", default=["resid_pre", "attn_out", "mlp_out"])
    parser.add_argument("--direction", default="noising", choices=["noising", "denoising"])
    parser.add_argument("--schedule", default="auto", help="auto, naive, rows, growing or prefix: the same numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, …; fp32 on a CPU")
    parser.add_argument(
        "--out", type=lambda text: Path(text).expanduser(), default=Path("artifacts/activation_patching")
    )
    options = parser.parse_args(arguments)

    interp.set_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"loading {options.model} …", flush=True)
    start = time.perf_counter()
    model = interp.load_model(options.model, device=options.device, dtype=options.dtype)
    loading = time.perf_counter() - start
    print(model)
    study = Study(model, options.out)
    study.lines += [
        f"# Activation patching · {model.name}",
        "",
        f"{model!r}" + (f", {model.note}" if model.note else ""),
    ]
    base, source = ("clean", "corrupted") if options.direction == "noising" else ("corrupted", "clean")
    study.lines += [
        f"Effects ({options.direction}): the {base} run with activations of the {source} run; "
        f"0 = nothing moved, 1 = became the {source} run. Intervals: 95 %, bootstrap over pairs.",
        "",
    ]
    how = {"direction": options.direction, "schedule": options.schedule}

    pairs = aligned_pairs(model, options.task, options.n, options.seed)
    names = position_names(model, pairs)
    effects = study.run("grid", interp.patch, pairs, interp.grid(options.components), **how)
    study.keep("grid", f"{options.task}: components by layer and position", effects)
    describe(study, f"{options.task}: layers × positions", effects, names)

    effects = study.run("heads", interp.patch, pairs, interp.heads("z"), **how)
    study.keep("heads", f"{options.task}: attention heads", effects)
    describe(study, f"{options.task}: heads", effects, {})
    show_attention(study, pairs.clean[0], effects)

    effects, pairs = fact_effects(study, options.components, how)
    study.keep("fact", "One fact: components by layer and position", effects)
    prompts = " / ".join(f'"{prompt}"' for prompt in (pairs.clean[0], pairs.corrupted[0]))
    describe(study, f"One fact: {prompts}", effects, position_names(model, pairs))

    print("\n" + write_summary(study, loading))
    print(f"open {(options.out / 'index.html').resolve()}")
    return options.out


if __name__ == "__main__":
    main()
