// A grid of features by tokens; only what fires is a cell that can be followed.
function line({ feature, href, note, size, exact, pin, pinned, cells }, data) {
  const name = el("div", { class: "feature" }, el("a", { href }, String(feature)), el("bdi", { title: note }, note),
    el("a", { href: pin, class: "pin", "aria-label": `${pinned ? "Unpin" : "Pin"} feature ${feature}` }, pinned ? "unpin" : "pin"))
  const row = el("tr", { class: pinned ? "pinned" : "" }, el("th", { scope: "row" }, name),
    el("td", { class: "size", "data-exact": exact, title: exact }, size))
  const found = new Map(cells.map(([column, ...rest]) => [column, rest]))
  data.tokens.forEach(([pos, text], column) => {
    const cell = el("td", { class: pos === data.current ? "cell current" : "cell" })
    if (found.has(column)) {
      const [level, value] = found.get(column)
      const label = `feature ${feature} on ${text} (${pos}): ${value}`
      const chosen = pos === data.current && feature === data.feature
      const link = el("a", { href: `${data.link}&f=${feature}&at=${pos}`, title: label, "aria-label": label,
        class: [level < 0 ? "cold" : "", chosen ? "current" : ""].filter(Boolean).join(" ") })
      link.style.setProperty("--level", `${Math.round(100 * Math.min(Math.abs(level), 1))}%`)
      cell.append(link)
    }
    row.append(cell)
  })
  return row
}

export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  const columns = data.tokens.map(([pos, text]) =>
    el("th", { scope: "col", class: pos === data.current ? "current" : "" },
      el("a", { class: "column", href: `${data.at}&at=${pos}`, title: `${text} (${pos})` }, text)))
  const head = el("tr", {}, el("th", { class: "name", scope: "col" }, "feature"),
    el("th", { class: "size", scope: "col", title: data.help }, data.measure), ...columns)
  root.append(el("table", { "aria-label": data.name }, el("thead", {}, head),
    el("tbody", {}, ...data.rows.map((row) => line(row, data)))))
}
