"""The look of every page: colours in light and dark, type, tables, paper; and the script that redraws Bokeh's canvases for it.

Plain text, so that reports and pictures share it. Every pair of colours that carries words has a contrast of 4.5 or more (WCAG
AA).
"""

from __future__ import annotations

FONT = "Helvetica, Arial, sans-serif"
INK, MUTED, RULE, PAPER = "#222222", "#6b6b6b", "#c8c8c8", "#ffffff"
#: What stands for each of them on a dark page.
DARK = {INK: "#e8e8e8", MUTED: "#ababab", RULE: "#4a4d52", PAPER: "#16181c"}

CSS = f"""
  :root {{ color-scheme: light dark; --ink: {INK}; --muted: {MUTED}; --rule: {RULE}; --paper: {PAPER}; --panel: #f4f6f8;
    --link: #1a5fa8; }}
  @media (prefers-color-scheme: dark) {{ :root {{ --ink: {DARK[INK]}; --muted: {DARK[MUTED]}; --rule: {DARK[RULE]};
    --paper: {DARK[PAPER]}; --panel: #21252b; --link: #8ab4f8; }} }}
  html, body {{ height: auto; background: var(--paper); }}
  body {{ margin: 0; font-family: {FONT}; color: var(--ink); -webkit-text-size-adjust: 100%; }}
  main {{ padding: 24px 28px 20px; box-sizing: border-box; max-width: 100%; }}
  header {{ margin: 0 0 14px; contain: inline-size; }}
  h1 {{ font-size: 19px; font-weight: 600; margin: 0 0 5px; line-height: 1.25; overflow-wrap: anywhere; }}
  header p {{ font-size: 13px; margin: 0; color: var(--muted); line-height: 1.45; overflow-wrap: anywhere; }}
  a {{ color: var(--link); }}
  :focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
  .picture {{ overflow-x: auto; max-width: 100%; }}
  /* A picture is as wide as its content where it is saved as one, in a frame of a notebook, and on a wide screen. */
  [data-whole] main, main.alone {{ width: max-content; min-width: min(520px, 100%); }}
  [data-whole] main {{ max-width: none; }}
  [data-whole] .picture {{ overflow: visible; max-width: none; }}
  @media (max-width: 640px) {{ main {{ padding: 16px 14px; }} }}
  @media print {{
    :root {{ color-scheme: light; --ink: #000000; --muted: #444444; --rule: #999999; --paper: #ffffff; --panel: #ffffff;
      --link: #000000; }}
    main {{ padding: 0; }} .picture {{ overflow: visible; break-inside: avoid; }} .screen {{ display: none; }}
    /* A sheet of A4's shape that holds a picture; printers make it as small as their paper, so that words are larger here. */
    @page {{ size: 1320px 1867px; margin: 36px; }}
    header p {{ font-size: 17px; }} h1 {{ font-size: 26px; }}
  }}
"""

#: Colours of Bokeh's models follow the page, and <html> tells when all is drawn, and its size.
SCRIPT = """
  document.addEventListener("DOMContentLoaded", () => {
    const root = document.documentElement, main = document.querySelector("main");
    const measure = () => {
      const box = main.getBoundingClientRect();
      root.dataset.width = Math.ceil(Math.max(box.right, main.scrollWidth + box.left) + window.scrollX);
      root.dataset.height = Math.ceil(box.bottom + window.scrollY);
    };
    const light = DARK_OF, dark = Object.fromEntries(Object.entries(light).map(([a, b]) => [b, a]));
    const scheme = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print");
    const docs = () => window.Bokeh ? Bokeh.documents : [];
    const paint = () => {
      const map = scheme.matches && !print.matches ? light : dark;
      for (const doc of docs()) for (const model of doc._all_models.values()) {
        const changes = {};
        for (const property of model) {
          if (!property.attr.endsWith("_color") || property._value === undefined) continue;
          const value = model[property.attr], plain = value && typeof value === "object" && "value" in value;
          const next = map[plain ? value.value : value];
          if (next) changes[property.attr] = plain ? {value: next} : next;
        }
        if (Object.keys(changes).length) model.setv(changes);
      }
    };
    scheme.addEventListener("change", paint);
    print.addEventListener("change", paint);
    new ResizeObserver(measure).observe(main);
    const timer = setInterval(() => {
      if (docs().every((doc) => doc.is_idle) && (docs().length || !main.dataset.bokeh)) {
        clearInterval(timer);
        if (scheme.matches) paint();
        name(); measure(); root.dataset.ready = "yes";
      }
    }, 50);
    // Bokeh draws on canvases inside shadow roots: what they show is said by the region that holds them. Its inputs get the
    // page's colours, and names.
    const name = () => {
      for (const canvas of deep(document, "canvas")) canvas.setAttribute("aria-hidden", "true");
      for (const button of deep(document, "[role=button], .bk-tool-icon, .bk-ToolbarButton, .bk-tool-button")) {
        if (!button.getAttribute("aria-label")) button.setAttribute("aria-label", button.title || "tool");
      }
      for (const handle of deep(document, "[role=slider]")) {
        const title = handle.getRootNode().querySelector?.(".bk-slider-title")?.textContent ?? "";
        handle.setAttribute("aria-label", title.split(":")[0] || "value");
      }
      const sheet = new CSSStyleSheet();
      sheet.replaceSync(`.bk-input { background-color: var(--panel); color: var(--ink); border-color: var(--rule); }
        .bk-slider-title, .bk-input-group > label { color: var(--ink); }`);
      for (const node of deep(document, "*")) {
        if (node.shadowRoot) node.shadowRoot.adoptedStyleSheets = [...node.shadowRoot.adoptedStyleSheets, sheet];
      }
    };
    const deep = (node, what) => [...node.querySelectorAll(what), ...[...node.querySelectorAll("*")].flatMap(
      (child) => child.shadowRoot ? deep(child.shadowRoot, what) : [])];
  });
""".replace("DARK_OF", str(DARK).replace("'", '"'))
