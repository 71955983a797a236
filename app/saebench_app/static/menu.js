// On a telephone the menu covers the page: it closes once something is chosen.
function close(event) {
  if (window.innerWidth > 768 || !event.composedPath().some((node) => node.tagName === "A")) return
  document.querySelector('[data-testid="stSidebarCollapseButton"] button')?.click()
}

export default function ({ parentElement, data }) {
  const root = container(parentElement, "nav")
  root.setAttribute("aria-label", "Pages")
  root.onclick = close
  root.append(...data.sections.map(({ title, links }) =>
    el("section", { "aria-label": title },
      el("h2", {}, title),
      ...links.map((link) => el("a", { href: link.href, "aria-current": link.current ? "page" : "" }, link.label)))))
}
