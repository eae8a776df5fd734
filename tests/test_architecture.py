"""The rules of the house, read off the source: who imports whom, who may open a trace, how long a file is.

A test is a rule, and names every file that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import interp

from .tools.house_counts import House

ROOT = Path(interp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: Rooms from the first to the last: a module imports from rooms that stand before its own.
ROOMS = (
    "errors", "journal", "packages", "markup", "files", "seeds", "order", "sites", "estimates", "findings", "generated", "cached",
    "edits", "views", "metrics", "tokens", "prompts", "encoded", "pairs", "cells", "product", "plan", "options",
    "spans", "effects", "models", "engine", "audit", "shards", "shuffled", "corpora", "windows", "generation",
    "running", "direct", "submitting", "methods", "saes", "steering", "circuits", "plots", "reports", "tracking", "tasks",
    "studies", "cli", "__main__",
)  # fmt: skip
#: What `tests/tools/house_counts.py` counts, at most.
COMPARISONS, LINES, ARGUMENTS, ANYS = 22, 60, 10, 335
#: Methods stand beside one another and import nothing of each other.
METHODS = ("patching", "paths", "tracing", "ablation", "attribution", "lens", "collect")
#: Imports from a later room, inside a function, each with its reason.
BACKWARD = {
    ("models/loading.py", "engine"): "load_model makes a backend, which needs a model",
    ("plan.py", "saes"): "features(sae) is a plan of the dictionary's view",
    ("models/loading.py", "generation"): "load_model gives a model the method that model.generate is",
    ("models/loading.py", "running"): "load_model gives a model the method that model.run is",
    ("audit/__main__.py", "cli"): "python -m interp.audit is another name of the command",
    ("models/loading.py", "audit"): "load_model checks the model that it has made, and gives it its audit",
}
#: What is sent to a server by source, and what else such a file may import. Six files at first; the engine's
#: part has become several.
SHIPPED = (
    "errors.py", "order.py", "sites.py", "edits.py", "views.py", "metrics.py",
    "models/layout.py", "engine/trace.py", "engine/forward.py",
    "engine/attention.py", "engine/state.py", "engine/readout.py", "engine/edges.py", "engine/gradients.py",
    "engine/edge_gradients.py", "engine/feature_edges.py", "engine/frozen.py", "engine/generating.py", "engine/rotary.py",
    "engine/views.py", "engine/hooked.py", "engine/rules.py", "engine/step_rules.py", "engine/softmax_rules.py",
    "engine/ruled.py", "engine/experts.py", "engine/neuron_edges.py",
    "saes/readers.py",
)  # fmt: skip
#: Packages that one room alone may import, wherever in its files.
OWNERS = {
    "bokeh": ("plots/",),
    "sae_lens": ("saes/",),
    "transformer_lens": ("saes/",),
    "wandb": ("tracking/",),
    "nnsight": ("models/", "engine/"),
    "networkx": ("circuits/", "plots/"),
}
#: Files longer than 300 lines, and how long they may be.
LONG = {
    "models/families.py": 500,  # a table: data, one row per architecture
    "circuits/circuit.py": 400,
    "engine/edges.py": 350,
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(name: str) -> str:
    first = name.split("/")[0].removesuffix(".py")
    return "methods" if first in METHODS else first


@cache
def tree(path: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(path.read_text())


@cache
def imports(name: str) -> list[tuple[str, bool]]:
    """Every module that a file imports, absolute ("interp.plan", "torch"), and whether at the top of the file.

    Imports for type checkers alone do not count.
    """
    package = ["interp", *name.split("/")[:-1]]
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                whole = child.level and not child.module  # `from . import tasks` names modules
                found.extend((f"{module}.{alias.name}" if whole else module, top) for alias in child.names)
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(tree(ROOT / name), True)
    return found


def test_every_file_stands_in_a_room() -> None:
    rooms = {room_of(name_of(path)) for path in FILES} - {"__init__"}
    assert rooms <= set(ROOMS), f"tell this test where {rooms - set(ROOMS)} stand"


def test_a_module_imports_from_earlier_rooms_only() -> None:
    offenders = []
    for name in map(name_of, FILES):
        own = room_of(name)
        for module, top in imports(name) if name != "__init__.py" else ():
            if not module.startswith("interp."):
                continue
            other = room_of(module.split(".")[1])
            if other == own and own != "methods":
                continue
            if (name, other) in BACKWARD:
                offenders += [f"{name} imports {module} when it is imported; do it where it is needed"] if top else []
            elif ROOMS.index(other) >= ROOMS.index(own):
                offenders.append(f"{name} imports {module}, a later room")
    assert not offenders, "\n".join(offenders)


def test_the_exceptions_are_still_needed() -> None:
    for name, other in BACKWARD:
        assert any(module.startswith(f"interp.{other}") for module, _ in imports(name)), (name, other)
    for name in (*LONG, *SHIPPED):
        assert (ROOT / name).exists(), name
    for name in LONG:
        assert len((ROOT / name).read_text().splitlines()) > 300, f"{name} is short again: take it off the list"


def test_packages_are_imported_by_the_room_that_owns_them() -> None:
    offenders = []
    for name in map(name_of, FILES):
        for module, _ in imports(name):
            owners = OWNERS.get(module.split(".")[0])
            if owners is not None and not name.startswith(owners):
                offenders.append(f"{name} imports {module}; only {owners} may")
    assert not offenders, "\n".join(offenders)


def test_wandb_is_imported_when_it_is_used() -> None:
    """Within a function, and in the process that speaks to it, not in a run's own."""
    found = {
        name: top for name in map(name_of, FILES) for module, top in imports(name) if module.split(".")[0] == "wandb"
    }
    assert found == {"tracking/child.py": False}


def test_traces_are_opened_in_one_place() -> None:
    """`engine/trace.py` opens traces; `engine/remote.py` opens the session that ships one of its functions whole."""
    found = set()
    for path in FILES:
        for node in ast.walk(tree(path)):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if called in ("trace", "session", "generate", "scan", "edit"):
                found.add((name_of(path), called))
    assert found == {("engine/trace.py", "trace"), ("engine/remote.py", "session")}


def test_there_is_one_loop_over_patches() -> None:
    """Only `run_plan`'s room sends programs to a backend; methods describe plans."""
    calls = [
        name_of(path)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("backend.run")
    ]
    assert calls and {name.split("/")[0] for name in calls} == {"engine"}
    assert len(calls) == 1, calls


def test_what_is_shipped_imports_torch_and_what_is_shipped() -> None:
    offenders = []
    for name in SHIPPED:
        for module, _ in imports(name):
            first = module.split(".")[0]
            target = f"{module.removeprefix('interp.').replace('.', '/')}.py"
            if first == "interp" and target not in SHIPPED:
                offenders.append(f"{name} imports {module}, which is not shipped")
            elif first not in (*sys.stdlib_module_names, "torch", "nnsight", "interp"):
                offenders.append(f"{name} imports {module}")
    assert not offenders, "\n".join(offenders)


def test_a_file_is_read_in_one_sitting() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    long = {name: count for name, count in lines.items() if count > LONG.get(name, 300)}
    assert not long, f"lines: {long}"


def test_a_module_says_first_what_it_is_for() -> None:
    silent = [name_of(path) for path in FILES if len(ast.get_docstring(tree(path)) or "") <= 20]
    assert not silent, silent


def test_what_is_public_is_described_and_annotated() -> None:
    offenders = []
    for path in FILES:
        for node in tree(path).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                offenders.append(f"{name_of(path)}: {node.name} has no docstring")
            if isinstance(node, ast.FunctionDef) and node.returns is None:
                offenders.append(f"{name_of(path)}: {node.name} does not say what it returns")
    assert not offenders, "\n".join(offenders)


def test_public_names() -> None:
    names = interp.__all__
    assert len(names) == len(set(names)) <= 60
    assert sorted(names) == list(names)
    assert set(names) <= set(dir(interp))
    for name in names:
        assert getattr(interp, name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'patchh'"):
        _ = interp.patchh  # type: ignore[attr-defined]


def test_every_lazy_name_is_public() -> None:
    assert set(interp._LATER) <= set(interp.__all__)


def test_kinds_of_sites_are_told_apart_by_their_table() -> None:
    """What must hold of each kind is the audit's to say, by name; everybody else asks the table."""
    found = House(ROOT).comparisons()
    assert len(found) <= COMPARISONS and {place.split("/")[0] for place in found} <= {"audit"}, "\n".join(found)


def test_functions_and_argument_lists_are_short() -> None:
    house = House(ROOT)
    assert not house.longest(LINES) and not house.arguments(ARGUMENTS), house.longest(LINES) | house.arguments(
        ARGUMENTS
    )


def test_few_types_are_left_open() -> None:
    assert House(ROOT).anys() <= ANYS


def test_no_file_imports_one_that_imports_it() -> None:
    assert House(ROOT).circles() == []


def test_the_door_alone_calls_a_backend() -> None:
    assert [place.split(":")[0] for place in House(ROOT).backend_calls()] == ["engine/door.py"]


def test_values_are_frozen() -> None:
    """All but the job, which is filled chunk by chunk while it is made, a training in progress, and SAELens's configuration."""
    thawed = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                if any(mark.startswith("dataclass") and "frozen=True" not in mark for mark in marks):
                    thawed.append(f"{name_of(path)}:{node.name}")
    assert thawed == [
        "circuits/greedy.py:Search",
        "engine/schedule.py:Job",
        "saes/train.py:Training",
        "saes/transcoder.py:BatchTopKTranscoderConfig",
    ]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_has_no_side_effect() -> None:
    """No slow or drawing package, no output, no thread, no file, no seed, no setting of torch is touched."""
    said = run(
        "import random, os, threading, numpy, torch\n"
        "before = (random.getstate(), torch.random.get_rng_state(), torch.is_grad_enabled(),\n"
        "          torch.get_default_dtype(), torch.get_num_threads(), sorted(os.listdir('.')), dict(os.environ))\n"
        "draw = numpy.random.get_state()[1].copy()\n"
        "import interp, sys\n"
        "after = (random.getstate(), torch.random.get_rng_state(), torch.is_grad_enabled(),\n"
        "         torch.get_default_dtype(), torch.get_num_threads(), sorted(os.listdir('.')), dict(os.environ))\n"
        "for a, b in zip(before, after): assert (torch.equal(a, b) if hasattr(a, 'shape') else a == b), (a, b)\n"
        "assert (draw == numpy.random.get_state()[1]).all()\n"
        "heavy = {'transformers', 'nnsight', 'pandas', 'xarray', 'bokeh', 'sae_lens', 'transformer_lens', 'wandb', 'networkx',\n"
        "         'matplotlib', 'IPython', 'scipy', 'h5py', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    assert said.strip() == ""


def test_sources_name_no_machine() -> None:
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"/(home|root|work|Users)/\w+", text), name_of(path)
