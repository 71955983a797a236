export default function ({ parentElement, data }) {
  const root = container(parentElement, "dl")
  root.classList.toggle("small", data.small)
  for (const tile of data.tiles) {
    const exact = tile.exact === null ? "" : String(tile.exact)
    root.append(
      el(
        "div",
        { title: [tile.help, exact].filter(Boolean).join("\n") },
        el("dt", {}, tile.name),
        el("dd", { class: tile.value.length > 14 ? "value long" : "value", "data-exact": exact }, tile.value),
        tile.note ? el("dd", { class: "note" }, tile.note) : null,
      ),
    )
  }
}
