export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  if (!data.comments.length) root.append(el("p", { class: "none" }, "No comment yet."))
  root.append(...data.comments.map(({ text, author, time }) =>
    el("article", {}, el("div", { class: "who" }, el("bdi", {}, author), ` · ${time}`), el("div", { class: "what", dir: "auto" }, text))))
}
