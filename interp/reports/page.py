"""The page of a report: its contents, its sections, and what makes tables sort and code copy."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..markup import definitions, table
from ..plots import Figure
from ..plots.standalone import standalone
from .parts import Section

CSS = """
  main { max-width: 1280px; font-size: 14px; line-height: 1.5; }
  h1 { font-size: 24px; margin-bottom: 10px; } h2 { font-size: 18px; margin: 34px 0 6px; overflow-wrap: anywhere; }
  section p { margin: 4px 0 8px; max-width: 78ch; }
  nav { background: var(--panel); padding: 10px 16px; border-radius: 6px; max-width: 78ch; box-sizing: border-box; }
  nav ol { margin: 4px 0; padding-left: 22px; }
  .scroll { overflow-x: auto; max-width: 100%; }
  table { border-collapse: collapse; font-size: 13px; margin: 10px 0; }
  caption { color: var(--muted); padding-bottom: 4px; }
  th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
  th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
  th button::after { content: " ↕"; color: var(--muted); } th[aria-sort=ascending] button::after { content: " ↑"; }
  th[aria-sort=descending] button::after { content: " ↓"; }
  details { margin: 8px 0; } summary { cursor: pointer; color: var(--link); }
  details td { overflow-wrap: anywhere; }
  pre { background: var(--panel); padding: 12px 14px; border-radius: 6px; overflow-x: auto; font-size: 12.5px; line-height: 1.45;
    margin: 8px 0; max-width: 100%; box-sizing: border-box; }
  .copy { font: inherit; font-size: 12px; color: var(--link); background: var(--panel); border: 1px solid var(--rule);
    border-radius: 4px; padding: 2px 10px; cursor: pointer; }
  @media (max-width: 640px) { h1 { font-size: 20px; } }
  @media print { main { font-size: 19px; } table, details { font-size: 16.5px; } h1 { font-size: 32px; }
    h2 { font-size: 25px; break-after: avoid; } section p, nav { max-width: none; }
    pre { white-space: pre-wrap; overflow-wrap: anywhere;
    border: 1px solid var(--rule); font-size: 15px; }
    th button::after { content: ""; } tr { break-inside: avoid; } .scroll { overflow: visible; } }
"""

SCRIPT = """
  document.addEventListener("DOMContentLoaded", () => {
    for (const table of document.querySelectorAll("table.sortable")) {
      const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
      heads.forEach((head, column) => {
        const button = document.createElement("button");
        button.type = "button";
        button.append(...head.childNodes);
        head.append(button);
        button.addEventListener("click", () => {
          const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
          const key = (row) => { const cell = row.cells[column];
            return cell.dataset.value !== undefined ? +cell.dataset.value : cell.textContent; };
          const rows = [...body.rows].sort((a, b) => {
            const x = key(a), y = key(b);
            return up * (typeof x === "number" && typeof y === "number" ? (x - y || 0) : String(x).localeCompare(String(y)));
          });
          body.append(...rows);
          heads.forEach((other) => other.removeAttribute("aria-sort"));
          head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
        });
      });
    }
    for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", async () => {
      const code = document.getElementById(button.dataset.of);
      const said = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
      try { await navigator.clipboard.writeText(code.textContent); said("Copied"); }
      catch { getSelection().selectAllChildren(code); said("Selected"); }
    });
    // On paper nothing can be opened.
    const print = matchMedia("print"), opened = new Set();
    print.addEventListener("change", () => {
      for (const details of document.querySelectorAll("details")) {
        if (print.matches && !details.open) { details.open = true; opened.add(details); }
        else if (!print.matches && opened.delete(details)) details.open = false;
      }
    });
  });
"""


def page_of(title: str, sections: Sequence[Section]) -> str:
    """The whole page as text."""
    headed = [(f"part-{number}", section) for number, section in enumerate(sections, start=1)]
    links = "".join(
        f'<li><a href="#{name}">{escape(section.title)}</a></li>' for name, section in headed if section.title
    )
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if links.count("<li>") > 1 else ""
    parts: list[str | Figure] = [f"<header><h1>{escape(title)}</h1></header>{contents}"]
    for name, section in headed:
        parts += parts_of(name, section)
    return standalone(title, parts, CSS, SCRIPT)


def parts_of(name: str, section: Section) -> list[str | Figure]:
    """A section as HTML and figures."""
    label = f' aria-labelledby="{name}"' if section.title else ""
    words = "".join(f"<p>{escape(word)}</p>" for word in section.words if word.strip())
    heading = f'<h2 id="{name}">{escape(section.title)}</h2>' if section.title else ""
    parts: list[str | Figure] = [f"<section{label}>{heading}{words}", *section.figures]
    rest = [
        f'<div class="scroll" role="group" tabindex="0" aria-label="table: {escape(each.caption or section.title, quote=True)}">'
        + table(each.columns, each.rows, each.caption, "sortable" if len(each.rows) > 1 else "")
        + "</div>"
        for each in section.tables
    ]
    if section.html:
        rest.append(
            f'<div class="scroll" role="group" tabindex="0" aria-label="{escape(section.title, quote=True)}">{section.html}</div>'
        )
    rest += [f"<pre>{escape(text)}</pre>" for text in section.text]
    if section.provenance:
        rest.append(
            f'<details><summary>Provenance</summary><div class="scroll">{definitions(section.provenance)}</div></details>'
        )
    if section.code:
        rest.append(
            f"<details><summary>Reproduce</summary><button type='button' class='copy screen' data-of='{name}-code'>Copy</button>"
            f'<pre id="{name}-code" tabindex="0">{escape(section.code)}</pre></details>'
        )
    return [*parts, "".join(rest) + "</section>"]
