export default function ({ parentElement, data }) {
  container(parentElement, "div").append(head(data.head))
}
