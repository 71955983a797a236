export default function ({ parentElement, data }) {
  const root = container(parentElement, "div")
  root.append(el("p", { class: data.kind, role: data.kind === "error" ? "alert" : "status" }, data.text))
}
