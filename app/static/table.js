function heading({ label, align, help, href, sorted }) {
  const arrow = { ascending: "▲", descending: "▼" }[sorted] ?? ""
  const name = href ? el("a", { href }, label) : label
  const mark = arrow ? el("span", { class: "arrow", "aria-hidden": "true" }, arrow) : null
  return el("th", { class: align, scope: "col", title: help, "aria-sort": sorted }, name, mark)
}

function cell({ text = "", exact, bar, href, kind }, { align }, first) {
  const content = kind === "token" ? el("bdi", { class: "token" }, text) : kind === "flag" ? flags(text) : text
  const shown = href ? el("a", { href, class: first ? "row" : "" }, content) : content
  const node = el("td", { class: [align, kind].filter(Boolean).join(" "), "data-exact": exact, title: kind === "words" ? text : exact }, shown)
  if (bar !== undefined) {
    node.classList.add("bar")
    node.style.setProperty("--bar", `${100 * Math.min(Math.max(bar, 0), 1)}%`)
  }
  return node
}

function flags(text) {
  return el("span", {}, ...text.split(" ").map((flag) => el("span", { class: "chip" }, flag)))
}

export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  root.classList.toggle("tall", data.height !== "")
  root.style.setProperty("--height", data.height)
  const head = el("thead", {}, el("tr", {}, ...data.headings.map(heading)))
  const rows = data.rows.map((row) => {
    const cells = row.map((one, column) => cell(one, data.headings[column], column === 0))
    return el("tr", { class: row[0].href ? "linked" : "" }, ...cells)
  })
  root.append(el("table", { "aria-label": data.name }, head, el("tbody", {}, ...rows)))
}
