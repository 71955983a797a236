export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  const bars = data.bars.map(({ size, text, href, current, height }) => {
    const inside = el("span", { class: "fill" })
    inside.style.height = `${100 * height}%`
    const attributes = { class: "bar", title: text, "data-size": String(size) }
    return href && size > 0
      ? el("a", { ...attributes, href, "aria-label": text, "aria-current": current ? "true" : "" }, inside)
      : el("span", attributes, inside)
  })
  const ticks = el("div", { class: "ticks", "aria-hidden": "true" }, ...data.edges.map((edge) => el("span", {}, edge)))
  if (data.head) root.append(head(data.head))
  root.append(
    el("div", { role: "figure", "aria-label": data.name },
      el("div", { class: "top", "aria-hidden": "true" }, data.top), el("div", { class: "bars" }, ...bars), ticks),
    el("div", { class: "axis" }, data.axis))
}
