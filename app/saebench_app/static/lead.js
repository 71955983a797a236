export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  root.append(...[
    data.label ? el("bdi", { class: "label" }, data.label) : null,
    data.explanation ? el("bdi", { class: "explanation" }, data.explanation) : null,
    data.note ? el("span", { class: "note" }, data.note) : null,
    data.links.length ? el("nav", { "aria-label": "Open this feature in" },
      ...data.links.map((link) => el("a", { href: link.href, title: link.help }, link.label))) : null,
  ].filter(Boolean))
  const write = (event) => {
    if (event.key.toLowerCase() !== "l" || event.shiftKey || typing(event)) return
    const field = document.querySelector(`input[aria-label="${data.labelField}"]`)
    if (!field) return
    event.preventDefault()
    field.focus()
    field.select()
  }
  window.addEventListener("keydown", write)
  return () => window.removeEventListener("keydown", write)
}
