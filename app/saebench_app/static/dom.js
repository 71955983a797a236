// Shared by all elements: nodes are made here, and texts become text nodes, never markup.

function el(tag, attributes, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes ?? {}))
    if (value !== null && value !== undefined && value !== false && value !== "") node.setAttribute(name, value)
  node.append(...children.filter((child) => child !== null && child !== ""))
  return node
}

// The element's own container: made on the first call, emptied on later ones.
function container(parent, tag) {
  let root = parent.querySelector(".root")
  if (!root) {
    root = el(tag, { class: "root" })
    parent.appendChild(root)
    root.addEventListener("click", (event) => follow(event, root))
  }
  root.replaceChildren()
  return root
}

// A plain click on a link changes the address and tells the app, as the browser's own Back does, so that it
// shows the other view without being loaded again. Any other click (new tab, window) is the browser's.
function follow(event, root) {
  if (event.button !== 0 || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return
  const path = event.composedPath()
  if (path.some((node) => node.tagName === "INPUT")) return
  let link = path.find((node) => node.tagName === "A")
  if (!link && String(document.getSelection())) return
  link ??= path.find((node) => node.tagName === "TR")?.querySelector("a.row")
  if (!link || !root.contains(link)) return
  event.preventDefault()
  history.pushState({}, "", link.href)
  window.dispatchEvent(new PopStateEvent("popstate", { state: {} }))
}

// What stands above an element: its title, and links to its other states.
function head({ title, help, choices = [] }) {
  const groups = choices.map(({ label, options }) =>
    el("nav", { class: "choices", "aria-label": label },
      ...options.map((one) =>
        el("a", { href: one.href, title: one.help, "aria-current": one.current ? "true" : "" }, one.label))))
  return el("div", { class: "head" }, title ? el("h3", { title: help }, title) : null, ...groups)
}

// Whether keys are being typed into something.
function typing(event) {
  const target = event.composedPath()[0]
  return event.ctrlKey || event.metaKey || event.altKey || target.isContentEditable
    || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName)
}
