"use strict";
(() => {  /* no name of it is the window's */
const data = JSON.parse(document.getElementById("data").textContent), words = data.words;
const element = (id) => document.getElementById(id), root = document.documentElement;
const list = element("list"), find = element("find"), sort = element("sort"), detail = element("detail");
const byNumber = new Map(data.features.map((f) => [f.n, f]));
let shown = [], chosen = null;

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const add = (parent, ...children) => { parent.append(...children); return parent; };

/* Numbers as people write them: three digits that count, no exponent where there need not be one. */
function number(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return size >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}
const round = (value) => value !== 0 && (value < 1e-3 || value >= 1e6)
  ? value.toExponential(0) : Number(value.toPrecision(6)).toLocaleString("en");
const percent = (share) => number(100 * share) + " %";

/* Whitespace as one sees it: blanks inside running text stay blanks, all else has a sign. */
const SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"};
function visible(token, strict) {
  const blank = strict || token.trim() === "";
  const signs = token.replace(/[\n\t\r\u00a0]/g, (c) => SIGNS[c]).replace(/ /g, blank ? "·" : " ");
  return signs.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0")) || "∅";
}

function tokens(feature, context, from, to) {
  const [, , , at, ids, levels] = context, made = [];
  for (let i = Math.max(0, from); i < Math.min(ids.length, to); i++) {
    const token = words[ids[i]], label = visible(token, false);
    const span = make(i === at ? "mark" : "span", "t", label);
    if (levels[i]) span.style.setProperty("--a", (levels[i] / data.levels).toFixed(3));
    span.classList.toggle("hot", levels[i] > 0);
    span.classList.toggle("sign", !levels[i] && label !== token);
    span.title = "“" + visible(token, true) + "”  " + number(levels[i] / data.levels * feature.m);
    made.push(span);
  }
  return made;
}

/* The list: what is looked for, in the order asked for. */
function texts(feature) {
  if (!feature.text) {
    const found = new Set([...feature.p, ...feature.s].map((pair) => pair[0]));
    for (const [, , , , ids, levels] of feature.c) ids.forEach((id, i) => { if (levels[i]) found.add(id); });
    feature.text = [...found].map((id) => visible(words[id], false).toLowerCase());
  }
  return feature.text;
}
function matches() {
  const query = find.value.trim().toLowerCase();
  const isNumber = /^\d+$/.test(query);
  const fits = (f) => !query || (isNumber && String(f.n).startsWith(query)) || texts(f).some((t) => t.includes(query));
  const key = sort.value, exact = (f) => isNumber && String(f.n) === query;
  return data.features.filter(fits).sort((a, b) =>
    exact(b) - exact(a) || (key === "n" ? 0 : b[key] - a[key]) || a.n - b.n);
}
function option(feature) {
  const row = make("div", "row"), facts = make("div", "facts");
  row.id = "f" + feature.n;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", "false");
  add(facts, make("b", "", "#" + feature.n), make("span", "", percent(feature.f / data.tokens)),
    make("span", "", "max " + number(feature.m)));
  const peek = make("div", "peek"), best = feature.c[0];
  if (best) add(peek, best[3] > 3 ? "…" : "", ...tokens(feature, best, best[3] - 3, best[3] + 8));
  else peek.textContent = "does not fire here";
  row.addEventListener("click", () => choose(feature.n));
  return add(row, facts, peek);
}
function fill() {
  shown = matches();
  list.replaceChildren(...shown.map(option));
  element("count").textContent = shown.length === data.features.length
    ? shown.length + " features" : shown.length + " of " + data.features.length + " features";
  if (shown.length) choose(shown.some((f) => f.n === chosen) && !find.value ? chosen : shown[0].n);
  else { chosen = null; list.removeAttribute("aria-activedescendant"); detail.replaceChildren(make("p", "", "No such feature.")); }
}
function choose(n) {
  chosen = n;
  for (const row of list.querySelectorAll('[aria-selected="true"]')) row.setAttribute("aria-selected", "false");
  const row = element("f" + n);
  if (row) {
    row.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", row.id);
    const low = row.offsetTop - list.offsetTop;  /* scrolls the list alone, never the page */
    if (low < list.scrollTop) list.scrollTop = low;
    else if (low + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = low + row.offsetHeight - list.clientHeight;
  }
  draw(byNumber.get(n));
}

/* One feature. */
function draw(feature) {
  const head = make("h2", "", "feature " + feature.n);
  const share = feature.f.toLocaleString("en") + " of " + data.tokens.toLocaleString("en") + " tokens";
  const facts = make("p", "", "fires on " + share + " (density " + percent(feature.f / data.tokens) + "), largest activation "
    + number(feature.m));
  const contexts = make("div");
  for (const context of feature.c) {
    const value = make("div", "value", number(context[2]));
    value.title = "text " + context[0] + ", token " + context[1];
    add(contexts, add(make("div", "context"), value, add(make("div", "tokens"), ...tokens(feature, context, 0, 1e9))));
  }
  if (!feature.c.length) add(contexts, make("p", "", "It does not fire on these texts."));
  const figures = make("div");
  figures.id = "figures";
  add(figures, titled("Activations above 0", "tokens, log scale, by activation", histogram(feature)),
    titled("Correlated features", "r of activations over all tokens", beside(feature)),
    titled("Promoted tokens", "logits for an activation of 1, direct path", pairs(feature.p, false)),
    titled("Suppressed tokens", "logits for an activation of 1, direct path", pairs(feature.s, true)));
  detail.replaceChildren(head, facts, titled("Where it fires most", "", contexts), figures);
}
function titled(title, caption, content) {
  const part = add(make("div"), make("h3", "", title));
  if (caption) add(part, make("p", "", caption));
  return add(part, content);
}
function pairs(given, down) {
  if (!given.length) return make("p", "", data.noDirect ? "not known: " + data.noDirect : "–");
  const most = Math.max(...given.map(([, by]) => Math.abs(by))) || 1, table = make("table");
  for (const [id, by] of given) {
    const token = make("td", "token", visible(words[id], true)), bar = make("div", down ? "bar down" : "bar");
    token.title = visible(words[id], true);
    bar.style.width = 100 * Math.abs(by) / most + "%";
    add(table, add(make("tr"), token, make("td", "number", number(by)), add(make("td"), bar)));
  }
  return table;
}
function beside(feature) {
  if (!feature.r.length) return make("p", "", "none");
  const table = make("table");
  for (const [n, r] of feature.r) {
    const name = make("td", "number"), bar = make("div", "bar");
    if (byNumber.has(n)) {
      const go = make("button", "", "#" + n);
      go.type = "button";
      go.addEventListener("click", () => { if (!shown.some((f) => f.n === n)) { find.value = ""; fill(); } choose(n); });
      add(name, go);
    } else name.textContent = "#" + n;
    bar.style.width = 100 * r + "%";
    add(table, add(make("tr"), name, make("td", "number", r.toFixed(2)), add(make("td"), bar)));
  }
  return table;
}

/* A histogram: counts on a log scale that begins at a half, so that one token is seen. */
function drawn(tag, facts, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(facts)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function histogram(feature) {
  if (!feature.f) return make("p", "", "none");
  const left = 46, top = 8, wide = 320, high = 120, bins = feature.h.length, most = Math.max(...feature.h);
  const y = (count) => high * Math.log(2 * count) / Math.log(2 * Math.max(most, 10) * 1.1);
  const svg = drawn("svg", {viewBox: "0 0 390 164", role: "img", "aria-label": "histogram of activations above 0"});
  for (let count = 1; count <= Math.max(most, 10); count *= 10) {
    const at = top + high - y(count);
    add(svg, drawn("line", {x1: left - 4, x2: left + wide, y1: at, y2: at}),
      drawn("text", {x: left - 8, y: at + 4, "text-anchor": "end"}, count.toLocaleString("en")));
  }
  feature.h.forEach((count, i) => {
    if (!count) return;
    const bar = drawn("rect", {x: left + wide * i / bins, y: top + high - y(count), width: Math.max(1, wide / bins - 1), height: y(count)});
    const span = number(i * feature.w) + " to " + number((i + 1) * feature.w);
    add(svg, add(bar, drawn("title", {}, span + ": " + count.toLocaleString("en") + (count === 1 ? " token" : " tokens"))));
  });
  const end = bins * feature.w, rough = end / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
  add(svg, drawn("line", {x1: left, x2: left + wide, y1: top + high, y2: top + high}));
  for (let value = 0; value <= end * 1.0001; value += step) {
    const x = left + wide * value / end;
    add(svg, drawn("line", {x1: x, x2: x, y1: top + high, y2: top + high + 4}),
      drawn("text", {x, y: top + high + 17, "text-anchor": "middle"}, round(value)));
  }
  return svg;
}

/* Keys, and what a browser without a debugger can read of the page. */
list.addEventListener("keydown", (event) => {
  const at = shown.findIndex((f) => f.n === chosen), page = 10;
  const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1, PageDown: at + page, PageUp: at - page}[event.key];
  if (to === undefined || !shown.length) return;
  event.preventDefault();
  choose(shown[Math.min(shown.length - 1, Math.max(0, to))].n);
});
find.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); list.focus(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) { event.preventDefault(); find.focus(); }
});
find.addEventListener("input", fill);
sort.addEventListener("change", fill);
element("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
function measure() {
  const box = document.querySelector("main").getBoundingClientRect();
  root.dataset.width = Math.ceil(box.right + window.scrollX);
  root.dataset.height = Math.ceil(box.bottom + window.scrollY);
}
fill();
new ResizeObserver(measure).observe(document.querySelector("main"));
measure();
root.dataset.ready = "yes";
})();
