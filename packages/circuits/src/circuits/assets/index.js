// The index of `circuits view`: a card for each graph, and the form that traces a new prompt.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http:/" + "/www.w3.org/2000/svg";
const percent = (x) => `${(100 * x).toFixed(0)} %`;
const address = (name) => `/graphs/${name.split("/").map(encodeURIComponent).join("/")}`;

function html(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
// Dots where the neurons are: tokens from left to right, layers upwards; a minus sign is a diamond.
function picture(dots) {
  const drawn = shape("svg", { viewBox: "0 0 300 120", "aria-hidden": "true" });
  dots.forEach(([x, y, size, sign], i) => {
    const spread = (i * 7) % 13, left = 14 + x * 258 + spread, up = 108 - y * 94 - ((i * 5) % 7), r = 1.2 + 3.4 * Math.sqrt(size);
    const common = { class: sign < 0 ? "minus" : "plus", "fill-opacity": 0.3 + 0.7 * size };
    drawn.append(sign < 0 ? shape("path", { ...common, d: `M${left} ${up - 1.2 * r}l${1.2 * r} ${1.2 * r}l${-1.2 * r} ${1.2 * r}l${-1.2 * r} ${-1.2 * r}z` })
      : shape("circle", { ...common, cx: left, cy: up, r }));
  });
  return drawn;
}
function card(graph) {
  if (graph.error) return html("li", {}, html("div", { className: "broken about" }, html("h2", { textContent: graph.name }), html("p", { className: "words", textContent: graph.error })));
  const targets = graph.targets.map((name, k) => `${name.trim().replace(/\s+/g, " ")} ${graph.values[k].toFixed(2)}`).join("   ");
  return html("li", {}, html("a", { href: address(graph.name) }, picture(graph.dots), html("div", { className: "about" },
    html("h2", { textContent: graph.prompt }), html("p", {}, html("b", { textContent: targets })),
    html("p", { className: "words", textContent: `${graph.nodes} nodes keep ${percent(graph.node_mass)}, ${graph.edges} edges ${percent(graph.edge_mass)}` }),
    html("p", { className: "words", textContent: `${graph.name} \u00b7 ${graph.model} \u00b7 ${graph.metric}` }))));
}

const tell = (what, bad = false) => { byId("progress").textContent = what; byId("progress").classList.toggle("bad", bad); };
async function ask(where, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  try {
    const answer = await (await fetch(where, options)).json();
    return answer.detail ? { error: JSON.stringify(answer.detail) } : answer;
  } catch (error) {
    return { error: `the server does not answer (${error.message})` };
  }
}
async function traceNew() {
  const values = Object.fromEntries(["prompt", "answer", "wrong"].map((id) => [id, byId(id).value]));
  byId("go").disabled = true;
  let state = await ask("/traces", values);
  if (!state.error) {
    const where = `/traces/${state.job}`;
    for (state = await ask(where); !state.error && !state.name; state = await ask(where)) {
      tell(`${state.stage} \u2026`);
      await new Promise((done) => setTimeout(done, 150));
    }
  }
  byId("go").disabled = false;
  if (state.error) return tell(state.error, true);
  tell("done");
  location.href = address(state.name);
  return undefined;
}

byId("graphs").append(...data.graphs.map(card));
if (!data.graphs.length) tell("No graphs yet: trace a prompt.");
byId("new").addEventListener("submit", (event) => { event.preventDefault(); traceNew(); });
