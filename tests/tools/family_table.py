"""Writes the table of docs/families.md by auditing a model of each: `make families`.

Tiny random models of every architecture that the tests know, with weights wide enough that no check is idle, and the
bundled real models that are on this machine. Between the two markers of the page nothing is written by hand.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import interp
from interp.errors import InterpError
from interp.models.families import FAMILIES as ROWS
from interp.models.packages import BUNDLED

from ..families import EAGER, SUPPORTED, UNSUPPORTED, loaded
from ..oracle.configs import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
START, END = "<!-- families: written by `make families` -->", "<!-- /families -->"
FALCON_EAGER = "pattern needs attn_implementation='eager'"


@dataclass(frozen=True)
class Audited:
    """One audited model: its row of the table of families, what it is called, and what the audit found."""

    family: str
    model_type: str
    passed: int
    checks: int
    missing: tuple[tuple[str, str], ...]
    reason: str = ""
    note: str = ""


def audited(family: str) -> Audited:
    """The audit of the tiny model of one of the tests' families."""
    model = loaded(family)
    report = model.audit()
    return Audited(
        model.family.name,
        spelled(family),
        sum(finding.ok for finding in report.findings),
        len(report.findings),
        tuple(sorted(model.family.missing.items())),
        "; ".join(f"{kind}: {why}" for kind, why in report.failed.items()),
        FALCON_EAGER if family in EAGER else "",
    )


def spelled(family: str) -> str:
    """The model type of one of the tests' families, with the variant where it is one."""
    model_type = FAMILIES[family][0]
    variant = family.removeprefix(f"{model_type}_") if family.startswith(f"{model_type}_") else ""
    return f"`{model_type}`" + (f" ({variant})" if variant else "")


def missing_text(missing: tuple[tuple[str, str], ...]) -> str:
    """Kinds of sites that are absent, those with one reason together."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for kind, reason in missing:
        by_reason[reason].append(f"`{kind}`")
    return "; ".join(f"{', '.join(kinds)} ({reason})" for reason, kinds in by_reason.items())


def family_lines(found: list[Audited]) -> list[str]:
    """One line per row of the table of families; a row whose variants lack different sites has one line for each."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Audited]] = {}
    for one in found:
        groups.setdefault((one.family, one.missing), []).append(one)
    order = {row.name: number for number, row in enumerate(ROWS)}
    lines = []
    for (family, missing), members in sorted(groups.items(), key=lambda group: order.get(group[0][0], 99)):
        types = ", ".join(one.model_type for one in members)
        passed, checks = sum(one.passed for one in members), sum(one.checks for one in members)
        failed = "; ".join(filter(None, (one.reason for one in members)))
        notes = "; ".join(dict.fromkeys(filter(None, (one.note for one in members))))
        absent = "; ".join(filter(None, (missing_text(missing), notes))) or "none"
        lines.append(f"| {family} | {types} | {passed} / {checks}{f' FAILED: {failed}' if failed else ''} | {absent} |")
    return lines


def refused_line(family: str) -> str:
    """What a person reads who loads an architecture that the library will not work on, or not wholly."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = loaded(family)
        except InterpError as error:
            return f"- `{FAMILIES[family][0]}`: {str(error).split(';')[0].split('. ')[0]}."
    said = [str(warning.message) for warning in caught if "refused" in str(warning.message)]
    kinds = ", ".join(f"`{kind}`" for kind in model.refused)
    assert kinds and said, f"{family} stands among the refused, but nothing of it was refused"
    return f"- `{FAMILIES[family][0]}`: loads by inference from its module names; the audit at load refuses {kinds}."


def real_line(name: str) -> str:
    """The audit of a bundled model, every layer; empty where it is not on this machine."""
    try:
        model = interp.load_model(name)
    except InterpError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return ""
    report = model.audit()
    passed = sum(finding.ok for finding in report.findings)
    verdict = "" if report.ok else f" FAILED: {report.failed}"
    absent = missing_text(tuple(sorted(model.family.missing.items()))) or "none"
    return (
        f"| `{name}` | {model.family.name} | {model.n_layers} | {passed} / {len(report.findings)}{verdict} | {absent} |"
    )


def table() -> str:
    """Everything between the markers."""
    untried = [kind for row in ROWS for kind in row.model_types if kind not in {f for f, _ in FAMILIES.values()}]
    parts = [
        "| family | HuggingFace model types | checks passed | sites it does not have |",
        "| - | - | -: | - |",
        *family_lines([audited(family) for family in SUPPORTED]),
        "",
        "Real models, every layer:",
        "",
        "| model | family | layers | checks passed | sites it does not have |",
        "| - | - | -: | -: | - |",
        *filter(None, map(real_line, BUNDLED)),
        "",
    ]
    if untried:
        parts += [
            f"Rows that name a type of which no model was audited here: {', '.join(f'`{k}`' for k in untried)}.",
            "",
        ]
    parts += ["Tried and refused, which is what an audit is for:", "", *map(refused_line, UNSUPPORTED)]
    return "\n".join(parts)


def main() -> None:
    """Replace what stands between the markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
