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
  return el("span", {}, ...text.split(" ").filter(Boolean).map((flag) => el("span", { class: "chip" }, flag)))
}

// Boxes to tick: what is ticked here and on other pages of the table is told to the app. With Shift, all rows
// from the one ticked before are ticked too. The app answers each with the table again: an answer that only
// repeats what it was told must not undo what has been ticked meanwhile.
function selection(root, data, setStateValue) {
  const echo = (root.told ?? []).indexOf(JSON.stringify(data.selected))
  if (echo >= 0) root.told.splice(0, echo + 1)
  else {
    root.ticked = new Set(data.selected)
    root.told = []
  }
  const ticked = root.ticked
  const boxes = []
  const tell = () => {
    for (const box of boxes) box.closest("tr").classList.toggle("ticked", box.checked)
    root.told.push(JSON.stringify([...ticked]))
    setStateValue("selected", [...ticked])
  }
  const tick = (box, on) => { box.checked = on; on ? ticked.add(Number(box.value)) : ticked.delete(Number(box.value)) }
  const all = el("input", { type: "checkbox", "aria-label": "all rows shown" })
  all.onchange = () => { boxes.forEach((box) => tick(box, all.checked)); tell() }
  const one = (number) => {
    const box = el("input", { type: "checkbox", value: String(number), "aria-label": `row ${number}` })
    const at = boxes.push(box) - 1
    box.checked = ticked.has(number)
    box.onclick = (event) => {
      const last = event.shiftKey ? boxes.findIndex((other) => other.value === root.last) : -1
      const [from, to] = last >= 0 ? [Math.min(last, at), Math.max(last, at)] : [at, at]
      const on = box.checked
      for (let i = from; i <= to; i++) tick(boxes[i], on)
      root.last = box.value
      tell()
    }
    return box
  }
  return { all, one }
}

export default function ({ parentElement, data, setStateValue }) {
  const root = container(parentElement, "div")
  root.style.setProperty("--height", data.height)
  const boxes = data.selected ? selection(root, data, setStateValue) : null
  const top = el("tr", {}, boxes ? el("th", { class: "tick", scope: "col" }, boxes.all) : null, ...data.headings.map(heading))
  const rows = data.rows.map((row) => {
    const cells = row.map((one, column) => cell(one, data.headings[column], column === 0))
    const box = boxes ? boxes.one(row[0].exact) : null
    const node = el("tr", { class: row[0].href ? "linked" : "" }, box ? el("td", { class: "tick" }, box) : null, ...cells)
    if (box?.checked) node.classList.add("ticked")
    return node
  })
  if (data.head) root.append(head(data.head))
  const made = el("table", { "aria-label": data.name }, el("thead", {}, top), el("tbody", {}, ...rows))
  root.append(el("div", { class: data.height ? "scroll tall" : "scroll" }, made))
}
