// The space that begins most tokens stays uncoloured: at the end of a line its colour would be left behind.
function span([text, level, label], peak) {
  if (label === undefined) return [text]
  const word = text.trimStart() || text
  const node = el("span", { class: peak ? "t peak" : "t", "data-act": label }, word)
  node.style.setProperty("--level", `${Math.round(100 * level)}%`)
  return [text.slice(0, text.length - word.length), node]
}

function row({ value, exact, spans, peak, before, after, source, place, href }) {
  const text = el("div", { class: "text", dir: "auto" })
  if (before) text.append(el("span", { class: "cut" }, "…"))
  text.append(...spans.flatMap((one, index) => span(one, index === peak)))
  if (after) text.append(el("span", { class: "cut" }, "…"))
  const origin = el("div", { class: "origin" }, source ? el("bdi", {}, source) : null,
    href ? el("a", { href, class: "place" }, place) : el("span", {}, place))
  return el("li", {}, el("div", { class: "value", "data-exact": exact }, value), el("div", {}, text, origin))
}

// The activation of the token under the pointer, or of the one that was tapped.
function point(event, root, tip) {
  const token = event.target.closest?.(".t")
  tip.hidden = !token
  if (!token) return
  tip.textContent = token.dataset.act
  const box = token.getClientRects()[0]
  const frame = root.getBoundingClientRect()
  tip.style.left = `${box.left - frame.left}px`
  tip.style.top = `${box.top - frame.top}px`
}

export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  const tip = el("div", { class: "tip", role: "tooltip", hidden: "hidden" })
  const legend = el("div", { class: "legend", "aria-label": `colours from 0 to ${data.scale}` },
    el("span", {}, "0"), el("span", { class: "ramp" }), el("span", {}, data.scale))
  root.append(legend, el("ol", {}, ...data.examples.map(row)), tip)
  root.onpointerover = (event) => point(event, root, tip)
  root.onpointerleave = () => { tip.hidden = true }
}
