const LANE = 3 // pixels high

// The space that begins most tokens stays uncolored: at the end of a line its color would be left behind.
function token([text, levels, title, quiet], index, data) {
  const word = text.trimStart() || text
  const current = index === data.current
  const node = el(data.link ? "a" : "span", {
    class: ["t", current ? "current" : "", quiet ? "quiet" : ""].filter(Boolean).join(" "),
    href: data.link ? `${data.link}${index}` : null, title, "data-act": title, "aria-current": current ? "true" : null,
    tabindex: data.link ? (index === Math.max(data.current, 0) ? "0" : "-1") : null,
  }, word)
  const most = Math.max(0, ...levels)
  if (most > 0 && data.lanes === 1) {
    node.classList.add("on")
    node.style.setProperty("--level", `${Math.round(100 * most)}%`)
  } else if (most > 0) stripes(node, levels)
  return [text.slice(0, text.length - word.length), node]
}

// One stripe below the token for each feature, each at its own height: the place tells what the color does.
function stripes(node, levels) {
  node.classList.add("laned")
  const color = (level, lane) => `color-mix(in srgb, var(--lane-${lane}) ${Math.round(25 + 75 * level)}%, transparent)`
  const images = levels.map((level, lane) => {
    const paint = level > 0 ? color(level, lane) : "transparent"
    return `linear-gradient(${paint}, ${paint})`
  })
  node.style.backgroundImage = images.join(", ")
  node.style.backgroundSize = levels.map(() => `100% ${LANE}px`).join(", ")
  node.style.backgroundPosition = levels.map((_, lane) => `0 calc(100% - ${(levels.length - 1 - lane) * (LANE + 1)}px)`).join(", ")
}

function entry({ name, href, note, scale, links }, lane, lanes) {
  const ramp = el("span", { class: "ramp", "aria-hidden": "true" })
  ramp.style.setProperty("--color", lanes === 1 ? "var(--hot)" : `var(--lane-${lane})`)
  return el("span", {}, ramp, el(href ? "a" : "span", { href, class: "name" }, name), note ? el("bdi", { title: note }, note) : null,
    el("span", { class: "quiet" }, scale), ...links.map(([text, to, label]) => el("a", { href: to, "aria-label": label }, text)))
}

// Arrow keys walk along the tokens; only one of them is a stop of the tab key.
function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
  const tokens = step && event.target.classList?.contains("t") ? [...event.currentTarget.querySelectorAll("a.t")] : []
  const next = tokens[tokens.indexOf(event.target) + step]
  if (!tokens.length) return
  event.stopPropagation()
  event.preventDefault()
  if (!next) return
  event.target.tabIndex = -1
  next.tabIndex = 0
  next.focus()
}

export default function ({ parentElement, data }) {
  const focused = parentElement.querySelector(".t:focus") !== null
  const root = container(parentElement, "div")
  root.classList.toggle("lanes", data.lanes > 1)
  if (data.legend.length)
    root.append(el("div", { class: "legend" }, ...data.legend.map((one, lane) => entry(one, lane, data.lanes))))
  const text = el("div", { class: data.tall ? "text tall" : "text", dir: "auto", role: "group", "aria-label": data.name })
  text.append(...data.spans.flatMap((one, index) => token(one, index, data)))
  if (!data.spans.length) text.append(el("span", { class: "empty" }, "no tokens"))
  text.onkeydown = walk
  root.append(text)
  if (focused) text.querySelector(".current")?.focus()
}
