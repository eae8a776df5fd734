"""Counts of the house, read off its syntax: `python -m tests.tools.house_counts [TREE]`.

tests/test_architecture.py holds their limits.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from interp.sites import KINDS as NAMES

#: Names of kinds of sites; where they are told apart by name, and which files may: the table of kinds, the table of families.
KINDS = frozenset(NAMES)
TABLES = ("sites.py", "models/families.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class House:
    """The files of a tree's package, each parsed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees = {
            path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))
        }

    def functions(self) -> Iterator[tuple[str, Function]]:
        """(file:name, function) of every function and method."""
        for name, tree in self.trees.items():
            yield from ((f"{name}:{node.name}", node) for node in ast.walk(tree) if isinstance(node, Function))

    def comparisons(self) -> list[str]:
        """file:line of comparisons with the name of a kind of site, outside the tables."""
        return [
            f"{name}:{node.lineno}"
            for name, tree in self.trees.items()
            for node in (ast.walk(tree) if name not in TABLES else ())
            if isinstance(node, ast.Compare) and any(map(_names_a_kind, (node.left, *node.comparators)))
        ]

    def longest(self, least: int) -> dict[str, int]:
        """Lines of the bodies of functions, docstrings not counted, of more than so many."""
        return {name: length for name, node in self.functions() if (length := _body(node)) > least}

    def arguments(self, least: int) -> dict[str, int]:
        """How many arguments functions name, of more than so many."""
        counts = {
            name: len([*a.posonlyargs, *a.args, *a.kwonlyargs])
            for name, a in ((n, f.args) for n, f in self.functions())
        }
        return {name: count for name, count in counts.items() if count > least}

    def anys(self) -> int:
        """Uses of `Any`."""
        nodes = (node for tree in self.trees.values() for node in ast.walk(tree))
        return sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)

    def backend_calls(self) -> list[str]:
        """file:line where a backend is called."""
        return [
            f"{name}:{node.lineno}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("backend.run", "backend.call"))
        ]

    def circles(self) -> list[list[str]]:
        """Files that import each other, imports inside functions counted, those for type checkers not."""
        graph = nx.DiGraph()
        for name in self.trees:
            graph.add_edges_from((name, other) for other in self._imports(name) if other != name)
        return sorted(sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1)

    def _imports(self, name: str) -> Iterator[str]:
        """Files of the package that a file imports; a name from a package may be a module of it."""
        folder = [self.root.name, *name.split("/")[:-1]]

        def visit(node: ast.AST) -> Iterator[ast.ImportFrom]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                    continue
                if isinstance(child, ast.ImportFrom) and child.level:
                    yield child
                yield from visit(child)

        for found in visit(self.trees[name]):
            base = [*folder[: len(folder) - found.level + 1], *(found.module or "").split(".")][1:]
            base = [part for part in base if part]
            modules = ["/".join([*base, alias.name]) + ".py" for alias in found.names]
            whole = ["/".join(base) + ".py", "/".join([*base, "__init__.py"])]
            known = [path for path in modules if path in self.trees]
            yield from known or [path for path in whole if path in self.trees]

    def lines(self) -> tuple[int, float]:
        """Lines of the package, and which part of them are comments."""
        total, comments = 0, 0
        for name in self.trees:
            with (self.root / name).open("rb") as file:
                comments += sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))
            total += len((self.root / name).read_text().splitlines())
        return total, comments / total


def _names_a_kind(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(_names_a_kind, node.elts))
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KINDS


def _body(node: Function) -> int:
    body = node.body
    if len(body) > 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def main() -> None:
    """Print every count."""
    house = House(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "interp").resolve())
    compared, (lines, comments) = house.comparisons(), house.lines()
    files = len({place.split(":")[0] for place in compared})
    print(f"comparisons with names of kinds: {len(compared)} in {files} files")
    print(f"functions over 60 lines: {house.longest(60)}")
    print(f"longest argument list: {max(house.arguments(0).values())}; over 10: {house.arguments(10)}")
    print(f"uses of Any: {house.anys()}")
    print(f"circles of imports: {[len(circle) for circle in house.circles()]} {house.circles()}")
    print(f"calls of a backend: {house.backend_calls()}")
    print(f"lines: {lines}, of which comments: {comments:.1%}")


if __name__ == "__main__":
    main()
