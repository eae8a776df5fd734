// What a keyboard and a screen reader miss in the theme's own pages.
addEventListener("DOMContentLoaded", () => {
  document.querySelector("[data-md-component=search]")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-nav[aria-labelledby]").forEach((nav, number) => {
    const label = document.getElementById(nav.getAttribute("aria-labelledby"))?.textContent.trim();
    nav.removeAttribute("aria-labelledby");
    nav.setAttribute("aria-label", `${label || "Pages"}, section ${number + 1}`);
  });
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach((box) => (box.tabIndex = 0)); // can be scrolled
  // The theme adds a bar with a button to each block of code, when it comes into sight.
  const name = () =>
    document.querySelectorAll(".md-code__nav:not([aria-label])").forEach((bar) => {
      bar.setAttribute("aria-label", `Code ${(name.count = (name.count || 0) + 1)}`);
    });
  name();
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
});
