async (targets) => {
  const within = (promise) => Promise.race([promise.catch(() => null), new Promise(r => setTimeout(r, 2500, null))])
  const loaded = (tag, attributes) => new Promise((done) => {
    const node = Object.assign(document.createElement(tag), attributes)
    node.onload = () => done(`${tag} loaded`); node.onerror = () => done(null)
    document.body.append(node)
  })
  const text = async (url, options) => { const got = await fetch(url, options); return got.status === 403 ? null : got.text() }
  const xhr = (method, url) => new Promise((done) => {
    const ask = new XMLHttpRequest(); ask.open(method, url); ask.withCredentials = true
    ask.onload = () => done(ask.status === 403 ? null : ask.responseText); ask.onerror = () => done(null); ask.send()
  })
  const socket = (url, protocols) => new Promise((done) => {
    const one = new WebSocket(url.replace(/^http/, "ws"), protocols)
    one.onopen = () => { one.close(); done("websocket opened") }; one.onerror = () => done(null)
  })
  const frame = (url, method) => new Promise((done) => {
    const node = document.createElement("iframe"); node.name = `f${Math.random()}`
    document.body.append(node)
    node.onload = () => { try { const body = node.contentDocument.body
        done(body && body.innerText && !/The explorer|This explorer/.test(body.innerText) ? `frame: ${body.innerText}` : null)
      } catch { done(null) } }
    if (method === "GET") { node.src = url; return }
    const form = Object.assign(document.createElement("form"), { action: url, method, target: node.name })
    form.append(Object.assign(document.createElement("input"), { name: "query", value: "SELECT 1" }))
    document.body.append(form); form.submit()
  })
  const events = (url) => new Promise((done) => {
    const one = new EventSource(url); one.onopen = () => done("events opened"); one.onerror = () => { one.close(); done(null) }
  })
  const found = {}
  await Promise.all(targets.flatMap(({ url, image, script, stream }) => Object.entries({
    [`fetch ${url}`]: text(url, { credentials: "include" }),
    [`fetch without cookies ${url}`]: text(url, { credentials: "omit", cache: "reload" }),
    [`put ${url}`]: text(url, { method: "PUT", body: "x", headers: { "x-xsrftoken": "x" } }),
    [`xhr ${url}`]: xhr("GET", url),
    [`xhr post ${url}`]: xhr("POST", url),
    [`image ${image}`]: loaded("img", { src: image }),
    [`script ${script}`]: loaded("script", { src: script }),
    [`style ${url}`]: loaded("link", { rel: "stylesheet", href: url }),
    [`websocket ${stream}`]: socket(stream),
    [`websocket with protocol ${stream}`]: socket(stream, ["streamlit", "x"]),
    [`frame ${url}`]: frame(url, "GET"),
    [`form ${url}`]: frame(url, "POST"),
    [`events ${url}`]: events(url),
  }).map(async ([name, promise]) => { found[name] = await within(promise) })))
  return found
}
