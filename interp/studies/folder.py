"""What every study does with what it finds: times it, keeps it in its folder, and writes summary and report at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd

from ..plots.browser import find_chromium
from ..reports import report

if TYPE_CHECKING:
    from ..models.model import Model
    from ..plots import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """Where a study of one model goes: lines of its summary, items of its report, what each step took."""

    model: Model
    out: Path
    title: str
    lines: list[str] = field(default_factory=list)
    items: list[object] = field(default_factory=list)
    costs: list[dict[str, object]] = field(default_factory=list)

    def timed(self, step: str, call: Callable[[], T], **facts: Callable[[T], object]) -> T:
        """The result of a call; its time, that of all cores together and the process's peak memory are kept, with facts of it."""
        print(f"{step} …", flush=True)
        start, cpu = time.perf_counter(), time.process_time()
        result = call()
        spent = {"seconds": time.perf_counter() - start, "of all cores": time.process_time() - cpu}
        more = {name: ask(result) for name, ask in facts.items()}
        self.costs.append({"step": step, **spent, "peak memory, GB": peak_memory(), **more})
        return result

    def draw(self, name: str, figure: Figure) -> None:
        """Write a page and, where there is a browser, a picture."""
        figure.save(self.out / f"{name}.html")
        if find_chromium() is not None:
            figure.save(self.out / f"{name}.png")

    def show(self, title: str, item: object) -> None:
        """Put something into the report."""
        self.items.append((title, item))

    def finish(self, first: Sequence[str] = ()) -> Path:
        """Write summary.md and the report, index.html, and print the summary and what was left out; the folder."""
        costs = pd.DataFrame(self.costs)
        rows = [
            [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in costs.values.tolist()
        ]
        table = [
            f"| {' | '.join(row)} |" for row in [list(costs.columns), ["-", *["-:"] * (len(costs.columns) - 1)], *rows]
        ]
        index = report([*first, *self.items, ("What each step took", costs)], self.out / "index.html", title=self.title)
        files = sorted({*(path.name for path in self.out.iterdir()), "summary.md"})
        listed = ["## Files", "", *(f"- {name}" for name in files), ""]
        text = "\n".join([f"# {self.title}", "", *self.lines, "", "## Cost", "", *table, "", *listed])
        (self.out / "summary.md").write_text(text, encoding="utf-8")
        print("\n" + text)
        if find_chromium() is None:
            print(
                "left out for want of a browser: a .png beside each page. Install Chromium (apt-get install chromium, "
                "brew install chromium), or set INTERP_CHROMIUM to its path"
            )
        print(f"open {index.resolve()}")
        return self.out


def peak_memory() -> float:
    """The most memory that this process has held so far, GB; NaN where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
