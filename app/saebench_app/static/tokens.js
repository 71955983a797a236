// The space that begins most tokens stays uncolored: at the end of a line its color would be left behind.
function span([text, level, label], peak) {
  if (label === undefined) return [text]
  const word = text.trimStart() || text
  const node = el("span", { class: peak ? "t peak" : "t", "data-act": label }, word)
  node.style.setProperty("--level", `${Math.round(100 * level)}%`)
  return [text.slice(0, text.length - word.length), node]
}

function row({ value, exact, spans, peak, before, after, source, place, href, title }) {
  const text = el("div", { class: "text", dir: "auto" })
  if (before) text.append(el("span", { class: "cut" }, "…"))
  text.append(...spans.flatMap((one, index) => span(one, index === peak)))
  if (after) text.append(el("span", { class: "cut" }, "…"))
  const origin = el("div", { class: "origin" }, source ? el("bdi", {}, source) : null,
    href ? el("a", { href, class: "place" }, place) : el("span", {}, place))
  const line = el("li", { tabindex: "-1" }, el("div", { class: "value", "data-exact": exact }, value), el("div", {}, text, origin))
  return title ? [el("li", { class: "title" }, title), line] : [line]
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

// The examples as lines of text; as Markdown, colored tokens are bold and nothing else is markup.
const literal = (text) => text.replace(/[\\`*_{}[\]()#+\-.!|<>&~$]/g, "\\$&")
function bold(text) {
  const [, before, word, after] = text.match(/^(\s*)([^]*?)(\s*)$/)
  return word ? `${before}**${literal(word)}**${after}` : literal(text)
}
function copied({ name, examples }, markdown) {
  const lines = examples.map(({ value, spans, source }) => {
    const text = spans.map(([piece, level]) => {
      const flat = piece.replaceAll("\n", "")
      return !markdown ? flat : level === undefined ? literal(flat) : bold(flat)
    }).join("")
    return markdown ? `- ${literal(value)}: ${text}${source ? ` (${literal(source)})` : ""}` : `${value}\t${text}`
  })
  return [markdown ? `**${literal(name)}**\n` : name, ...lines].join("\n")
}

function copier(label, data, markdown) {
  const button = el("button", { type: "button" }, label)
  button.onclick = async () => {
    await navigator.clipboard.writeText(copied(data, markdown))
    button.textContent = "Copied"
    setTimeout(() => { button.textContent = label }, 1500)
  }
  return button
}

// J and K: the next and the previous example.
function step(event, root) {
  const way = { j: 1, k: -1 }[event.key.toLowerCase()]
  if (!way || event.shiftKey || typing(event)) return
  const lines = [...root.querySelectorAll("li:not(.title)")]
  const now = lines.indexOf(root.querySelector("li.now"))
  const next = lines[Math.min(Math.max(now + way, 0), lines.length - 1)]
  if (!next) return
  lines[now]?.classList.remove("now")
  next.classList.add("now")
  next.focus({ preventScroll: true })
  next.scrollIntoView({ block: "center" })
}

let unfolded = false
function settings(data) {
  if (!data.settings) return null
  const fold = el("details", { class: "settings" }, el("summary", {}, data.settings.title))
  fold.open = unfolded
  fold.ontoggle = () => { unfolded = fold.open }
  for (const choice of data.settings.choices)
    fold.append(el("div", {}, el("span", {}, choice.label), head({ choices: [choice] })))
  fold.append(el("div", {}, el("span", {}, "Copy"), copier("as text", data, false), copier("as Markdown", data, true)))
  return fold
}

export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  const tip = el("div", { class: "tip", role: "tooltip", hidden: "hidden" })
  const low = data.low ?? "0"
  const legend = el("div", { class: "legend", "aria-label": `colors from ${low} to ${data.scale}` },
    el("span", {}, low), el("span", { class: "ramp" }), el("span", {}, data.scale))
  if (data.head) root.append(head(data.head))
  const fold = settings(data)
  root.append(el("div", { class: "bar" }, fold, legend), el("ol", {}, ...data.examples.flatMap(row)), tip)
  root.onpointerover = (event) => point(event, root, tip)
  root.onpointerleave = () => { tip.hidden = true }
  if (!data.name) return
  const listen = (event) => step(event, root)
  window.addEventListener("keydown", listen)
  return () => window.removeEventListener("keydown", listen)
}
