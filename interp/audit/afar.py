"""The audit of a model whose weights are elsewhere: traced runs held against plain ones, both made there.

What is expected comes from torch's own hooks on the model's modules in a forward pass that no trace touches
(`interp.engine.hooked`): a read must be what a module received or gave, and a write must do to the logits what the same change by
a hook does. A handful of requests with random prompts; no weight comes here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..engine.hooked import hooked
from ..engine.program import Program
from ..engine.reading import Reading, entry, read_program, run_readings
from ..engine.schedule import token_budget
from ..engine.trace import Found, Function, execute
from ..findings import Finding
from ..models.layout import mix_values, part_index
from ..models.model import Model
from ..sites import HEAD_KINDS, KIND
from .parts import compare, kinds_of
from .plain import COPIES

#: Kinds that no module's input or output is: what is read at the written row must fit together.
INSIDE = ("q_rot", "k_rot", "pattern")
#: What a block adds to the stream, and the stream between: that is no module's alone, and moves with what attention adds.
ADDED, BETWEEN = ("attn_out", "mlp_out"), {"resid_mid": "attn_out"}
#: Kinds that have no module of their own, but can be written as another kind is by a hook.
AS = {"head_out": "z", **BETWEEN}
#: Rows of writes in one forward pass, at most.
ROWS = 64
Spot = tuple[str, str]


def ask(model: Model, programs: Sequence[Program], function: Function = execute) -> list[Found]:
    """Run programs through the door, in their order."""
    found: dict[int, Found] = {}

    def place(piece: Reading, result: Found) -> None:
        found[piece.asked[0]] = result

    pieces = [Reading((number,), lambda _, made=program: made, program) for number, program in enumerate(programs)]  # type: ignore[misc]
    run_readings(model, pieces, place, function)
    return [found[number] for number in range(len(programs))]


def spots(model: Model, layer: int) -> dict[str, Spot]:
    """Where torch's hooks find each kind of site of a layer: (path of a module, "input" or "output")."""
    family, block = model.family, f"{model.family.layers}.{layer}"
    behind = layer + 1 < model.n_layers
    found: dict[str, Spot | None] = {
        "resid_pre": (block, "input"),
        "resid_post": (f"{family.layers}.{layer + 1}" if behind else family.norm, "input"),
        "resid_mid": (f"{block}.{family.norm2}", "input") if family.norm2 and family.norm2 != family.norm1 else None,
        **{kind: (f"{block}.{path}", "output") for kind, path in zip("qkv", family.qkv, strict=True)},
        "z": (f"{block}.{family.o}", "input"),
        "attn_out": (f"{block}.{family.post_attn or family.o}", "output"),
        "mlp_in": (f"{block}.{family.mlp or family.mlp_pre}", "input"),  # OPT has no module around its MLP
        "mlp_out": (f"{block}.{family.post_mlp or family.down or family.mlp}", "output"),
        "neuron": (f"{block}.{family.down}", "input") if family.down else None,
        "mlp_pre": (f"{block}.{family.mlp_pre}", "output") if family.mlp_pre else None,
    }
    have = kinds_of(model)
    return {kind: spot for kind, spot in found.items() if spot is not None and kind in have}


def audit_from_afar(model: Model, prompt: Sequence[int], other: Sequence[int]) -> Iterator[Finding]:
    """Every read and write of every layer, and padding."""
    kinds, layers = kinds_of(model), range(model.n_layers)
    reads = [(-1, "embed"), *((layer, kind) for layer in layers for kind in (*kinds, "value"))]
    (run,) = ask(model, [read_program(model, [prompt], reads)])
    keep = [(model.family.embed, "output"), *(spot for layer in layers for spot in spots(model, layer).values())]
    rows = [list(prompt)] * (1 + COPIES)
    plain_run = with_hooks(read_program(model, rows), keep=keep, moved=list(range(1, 1 + COPIES)))
    (plain,) = ask(model, [plain_run], hooked)
    logits = plain["logits"]
    noise = (logits[1:] - logits[:1]).abs().amax()[None].float()
    yield compare("logits", "read", model.n_layers, run["logits"].cpu(), logits[:1], noise=noise)
    yield compare("embed", "read", 0, run["reads"][-1, "embed"].cpu(), plain["kept"][model.family.embed, "output"])
    for layer in layers:
        here = {kind: run["reads"][layer, kind].cpu() for kind in (*kinds, "value") if (layer, kind) in run["reads"]}
        yield from check_reads(model, layer, here, plain["kept"])
    yield from check_writes(model, prompt, kinds, run, noise)
    yield from check_inside(model, prompt, other, kinds, run)
    yield from check_identity(model, prompt, kinds, noise)
    yield from check_padding(model, prompt, noise)


def with_hooks(
    program: Program, keep: Sequence[Spot] = (), changes: Sequence[tuple[object, ...]] = (), moved: Sequence[int] = ()
) -> Program:
    """A program as a plain forward pass."""
    program["plain"] = {"keep": list(keep), "changes": list(changes), "moved": list(moved)}
    return program


def shaped(model: Model, kind: str, value: Tensor) -> Tensor:
    """What a module received or gave, as the kind of site is read: by head, or the part of a fused projection."""
    if kind in HEAD_KINDS or KIND[kind].axis == "unit":
        value = value[..., part_index(model.taps, kind)]
        return value if kind in HEAD_KINDS else value[..., 0]
    return value * model.taps["branch"] if kind in ADDED else value


def check_reads(model: Model, layer: int, here: Mapping[str, Tensor], kept: Mapping[Spot, Tensor]) -> Iterator[Finding]:
    """Every read of a layer against what its modules received and gave, and against the sums that the reads must make."""
    for kind, spot in spots(model, layer).items():
        yield compare(kind, "read", layer, here[kind], shaped(model, kind, kept[spot]).reshape(here[kind].shape))
    pre, post, added = here["resid_pre"], here["resid_post"], (here["attn_out"], here["mlp_out"])
    yield compare("resid_post", "read", layer, pre + added[0] + added[1], post, beside=(pre, *added))
    if (mid := here.get("resid_mid")) is not None:
        yield compare("resid_mid", "read", layer, pre + added[0], mid, beside=(pre, *added))
    if (pattern := here.get("pattern")) is not None:
        value = here["value"] if here["v"].shape == getattr(here.get("value"), "shape", None) else here["v"]
        for mixed, kinds in ((value, INSIDE), (here["v"], "v")):
            for kind in [name for name in kinds if name in here]:
                got = mix_values(pattern, mixed.transpose(1, 2))
                yield compare(kind, "read", layer, got, here["z"], beside=(value.abs().max()[None],))
    if (heads := here.get("head_out")) is not None and model.family.post_attn is None:
        summed = heads.sum(2) * model.taps["branch"]
        bias = (added[0] - summed)[:, :1]  # what the projection adds by itself is alike at every position
        yield compare("head_out", "read", layer, summed + bias, added[0], beside=(heads,))


def check_writes(
    model: Model, prompt: Sequence[int], kinds: Sequence[str], run: Found, noise: Tensor
) -> Iterator[Finding]:
    """A step at each kind of site does to the logits what the same step does by a hook, and does something."""
    wanted = [
        (layer, kind) for layer in range(model.n_layers) for kind in kinds if kind in spots(model, layer) or kind in AS
    ]
    wanted.sort(key=lambda site: (site[0] + KIND[site[1]].stage, site))
    rows = max(4, min(ROWS, token_budget(model) // len(prompt) - 1))
    chunks = [wanted[start : start + rows] for start in range(0, len(wanted), rows)]
    traced, plain = [], []
    for chunk in chunks:
        steps = {site: step_of(model, site, run) for site in chunk}
        edits, changes = [], []
        for row, (layer, kind) in enumerate(chunk, start=1):
            part = model.heads_of(kind) - 1 if kind in HEAD_KINDS else -1
            place = len(prompt) - 1 if layer == model.n_layers - 1 else len(prompt) // 2  # where it reaches the logits
            edits.append(entry(layer, kind, "add", row, column=place, source_column=place, value=0, part=part))
            changes.append(change_of(model, (layer, kind), row, place, steps[layer, kind]))
        values = {site: step[None, None] for site, step in steps.items()}
        stage = [layer + KIND[kind].stage for layer, kind in chunk]
        traced.append(read_program(model, [prompt], edits=edits, values=values, origin=[0] * len(chunk), stage=stage))
        plain.append(with_hooks(read_program(model, [list(prompt)] * (1 + len(chunk))), changes=changes))
    for chunk, got, want in zip(chunks, ask(model, traced), ask(model, plain, hooked), strict=True):
        for row, (layer, kind) in enumerate(chunk, start=1):
            a, b = got["logits"][row : row + 1].cpu(), want["logits"][row : row + 1]
            note = (
                ""
                if (b - want["logits"][:1]).abs().max() > noise.max()
                else "it moves the logits no more than rounding"
            )
            yield compare(kind, "write", layer, a, b, note, noise=noise)


def step_of(model: Model, site: tuple[int, str], run: Found) -> Tensor:
    """A random step of the size of what stands at a site, as the engine takes it for one head or for all of the site."""
    layer, kind = site
    tensor = run["reads"][layer, KIND[kind].through or kind].cpu()
    width = int(part_index(model.taps, kind).max()) + 1 if KIND[kind].axis else tensor.shape[-1]
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(width, generator=generator) * max(float(tensor.float().std()), 1e-2)


def change_of(model: Model, site: tuple[int, str], row: int, place: int, step: Tensor) -> tuple[object, ...]:
    """The same step for a hook: (path, side, row, column, index, value)."""
    layer, kind = site
    known = spots(model, layer)
    if kind in HEAD_KINDS:
        index = part_index(model.taps, kind)[-1]
        return (*known[AS.get(kind, kind)], row, place, index, step[index])
    if KIND[kind].axis == "unit":
        index = part_index(model.taps, kind)[:, 0]
        return (*known[kind], row, place, index, step[index])
    if (added := BETWEEN.get(kind, kind)) in ADDED:
        return (*known[added], row, place, None, step / model.taps["branch"])
    return (*known[kind], row, place, None, step)


def check_inside(
    model: Model, prompt: Sequence[int], other: Sequence[int], kinds: Sequence[str], run: Found
) -> Iterator[Finding]:
    """z is the values mixed by the pattern, also in a row that was written; and a head's q, k or v moves its own z alone."""
    inside, place = [kind for kind in INSIDE if kind in kinds], len(prompt) // 2
    projected = [] if model.family.joint_qk_norm else ["q", "k"]
    heads = [*projected, "v"]
    programs = []
    for layer in range(model.n_layers):
        edits = [entry(layer, kind, "replace", 2 + number, source=1) for number, kind in enumerate(inside)]
        values = {(layer, kind): step_of(model, (layer, kind), run)[None, None] for kind in heads}
        for row, kind in enumerate(heads, start=2 + len(inside)):
            part = model.heads_of(kind) - 1
            edits.append(entry(layer, kind, "add", row, column=place, source_column=place, value=0, part=part))
        last, count = layer + 1 if layer + 1 < model.n_layers else None, len(inside) + len(heads)
        reads = [(layer, kind) for kind in (*inside, "v", "value", "z")]
        programs.append(
            read_program(
                model,
                [prompt, other],
                reads,
                edits=edits,
                values=values,
                origin=[0] * count,
                stage=[layer] * count,
                last=last,
            )
        )
    for layer, found in enumerate(ask(model, programs)):
        got = {kind: value.cpu() for (_, kind), value in found["reads"].items()}
        value, z = got.get("value", got["v"]), got["z"]
        value = value if value.shape[1:] == got["v"].shape[1:] else got["v"]
        size = (value.abs().max()[None],)
        if "pattern" in inside:
            for row, kind in enumerate(inside, start=2):
                written = KIND[kind].view == "mixture"  # as what the other run's pattern makes of the values
                pattern = got["pattern"][1:2] if written else got["pattern"][row : row + 1]
                mixed = mix_values(pattern, value[row : row + 1].transpose(1, 2))
                yield compare(kind, "write", layer, z[row : row + 1], mixed, beside=size)
                if not written:
                    yield compare(kind, "write", layer, got[kind][row : row + 1], got[kind][1:2])
        for row, kind in enumerate(heads, start=2 + len(inside)):
            reach = model.n_heads // model.heads_of(kind)
            outside = z[row : row + 1, :, :-reach], z[:1, :, :-reach]
            yield compare(kind, "write", layer, *outside, beside=(z[:1],))


def check_identity(model: Model, prompt: Sequence[int], kinds: Sequence[str], noise: Tensor) -> Iterator[Finding]:
    """Patching a run with itself, at every layer at once, changes nothing."""
    edits = [
        entry(layer, kind, "replace", 1 + row, source=0)
        for row, kind in enumerate(kinds)
        for layer in range(model.n_layers)
    ]
    zeros = [0] * len(kinds)
    logits = ask(model, [read_program(model, [prompt], edits=edits, origin=zeros, stage=zeros)])[0]["logits"].cpu()
    for row, kind in enumerate(kinds, start=1):
        yield compare(kind, "self-patch", model.n_layers, logits[row], logits[0], noise=noise)


def check_padding(model: Model, prompt: Sequence[int], noise: Tensor) -> Iterator[Finding]:
    """A left-padded row beside another gives the logits of the same prompt alone."""
    short = list(prompt[: max(2, len(prompt) - 3)])
    both, alone = ask(model, [read_program(model, [prompt, short]), read_program(model, [short])])
    yield compare("logits", "padding", model.n_layers, both["logits"][1:].cpu(), alone["logits"].cpu(), noise=noise)
