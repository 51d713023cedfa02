"use strict";
const graph = JSON.parse(document.getElementById("data").textContent);
const { header, nodes, edges } = graph;
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const plot = byId("plot"), panel = byId("panel"), tip = byId("tip");
const STEP = 17, GAP = 26, LEFT = 54;
const sum = (list, value) => list.reduce((total, item) => total + value(item), 0);
const number = (x) => (Math.abs(x) >= 1e-3 || x === 0 ? x.toFixed(3) : x.toExponential(1));
const percent = (x) => `${(100 * x).toFixed(x >= 0.1 ? 0 : 1)} %`;
const isNeuron = (node) => node.kind === "neuron";
const strength = (node) => sum(node.total, Math.abs);

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
function html(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// An edge matters by the share of the targets that passes through it.
nodes.forEach((node, id) => Object.assign(node, { id, ins: [], outs: [], shown: true }));
edges.forEach((edge) => {
  const target = nodes[edge.target];
  const unit = target.kind === "logit" ? 1 : strength(target) / Math.max(Math.abs(target.activation), 1e-12);
  edge.share = Math.abs(edge.weight) * unit;
  nodes[edge.source].outs.push(edge);
  target.ins.push(edge);
});
edges.sort((a, b) => b.share - a.share);
for (const node of nodes) for (const list of [node.ins, node.outs]) list.sort((a, b) => b.share - a.share);
const ranked = nodes.filter(isNeuron).sort((a, b) => strength(b) - strength(a));
const mass = sum(ranked, strength);

const state = { target: 0, count: ranked.length, edges: Math.min(edges.length, 250), picked: null };
const scale = () => Math.max(...ranked.map((node) => Math.abs(node.total[state.target])), 1e-12);

function place() {
  const cells = new Map();
  const row = (node) => (node.layer < 0 ? 0 : node.layer + 1);
  for (const node of nodes) {
    if (!node.shown) continue;
    const key = `${row(node)},${node.position}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  const columns = header.tokens.map((token, position) => {
    const most = Math.max(1, ...[...cells].filter(([key]) => key.endsWith(`,${position}`)).map(([, list]) => list.length));
    const across = Math.max(2, Math.ceil(Math.sqrt(most * 1.6)));
    return { across, width: Math.max(across * STEP + GAP, token.length * 7.5 + GAP) };
  });
  let x = LEFT;
  for (const column of columns) { column.x = x; x += column.width; }
  const rows = [];
  let y = 0;
  for (let r = header.n_layers + 1; r >= 0; r--) {
    const down = Math.max(1, ...columns.map((column, position) => {
      const list = cells.get(`${r},${position}`) || [];
      return r > header.n_layers ? list.length * 1.35 : Math.ceil(list.length / column.across);
    }));
    rows[r] = { y, height: down * STEP + GAP * 0.75 };
    y += rows[r].height;
  }
  for (const [key, list] of cells) {
    const [r, position] = key.split(",").map(Number);
    const column = columns[position];
    list.sort((a, b) => strength(b) - strength(a));
    list.forEach((node, i) => {
      // The strongest stand in the middle of their column, the others fall away to both sides.
      const step = i % column.across, aside = step % 2 ? (step + 1) / 2 : -step / 2, logit = node.kind === "logit";
      const down = logit ? i * 1.35 : r === 0 ? 0 : Math.floor(i / column.across);
      node.x = column.x + column.width / 2 + (logit ? 0 : r === 0 ? i : aside) * STEP;
      node.y = rows[r].y + GAP * 0.4 + STEP / 2 + down * STEP;
    });
  }
  const labels = nodes.filter((node) => node.kind === "logit").map((node) => node.x + node.label.length * 7.5 + 70);
  return { columns, rows, width: Math.max(x + 10, ...labels), height: y };
}

let view = null, world = null;
const setView = () => plot.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
function fit() {
  const box = plot.getBoundingClientRect(), ratio = box.height / Math.max(box.width, 1);
  const w = Math.max(world.width, world.height / ratio);
  view = { x: (world.width - w) / 2, y: (world.height - w * ratio) / 2, w, h: w * ratio };
  setView();
}

function draw() {
  ranked.forEach((node, rank) => { node.shown = rank < state.count; });
  world = place();
  plot.replaceChildren();
  const back = element("g", {}, plot);
  world.rows.forEach((band, r) => {
    if (r % 2) element("rect", { class: "band", x: 0, y: band.y, width: world.width, height: band.height }, back);
    const name = r === 0 ? "input" : r > header.n_layers ? "output" : `layer ${r - 1}`;
    element("text", { class: "soft", x: 6, y: band.y + band.height / 2 + 4 }, back, name);
  });
  const lines = element("g", {}, plot), marks = element("g", {}, plot);
  const drawn = edges.filter((edge) => nodes[edge.source].shown && nodes[edge.target].shown);
  const visible = new Set(drawn.slice(0, state.edges));
  if (state.picked !== null) for (const edge of [...nodes[state.picked].ins, ...nodes[state.picked].outs]) visible.add(edge);
  const most = Math.max(...drawn.slice(0, 1).map((edge) => edge.share), 1e-12);
  for (const edge of visible) drawEdge(edge, most, lines);
  const top = scale();
  for (const node of nodes) if (node.shown) drawNode(node, top, marks);
  byId("count-out").textContent = `${state.count} (${percent((sum(ranked.slice(0, state.count), strength) / (mass || 1)) * header.node_mass_kept)})`;
  byId("edges-out").textContent = `${Math.min(state.edges, drawn.length)} of ${edges.length}`;
}

function near(node) {
  if (state.picked === null || node.id === state.picked) return true;
  return nodes[state.picked].ins.some((edge) => edge.source === node.id) || nodes[state.picked].outs.some((edge) => edge.target === node.id);
}

function drawEdge(edge, most, parent) {
  const a = nodes[edge.source], b = nodes[edge.target];
  if (!a.shown || !b.shown) return;
  const touches = state.picked !== null && (edge.source === state.picked || edge.target === state.picked);
  if (state.picked !== null && !touches) return;
  const weight = Math.sqrt(edge.share / most), middle = (a.y + b.y) / 2;
  element("path", {
    class: edge.weight < 0 ? "edge minus" : "edge",
    d: `M${a.x},${a.y} C${a.x},${middle} ${b.x},${middle} ${b.x},${b.y}`,
    "stroke-width": 0.4 + 3 * weight,
    "stroke-opacity": touches ? 0.35 + 0.6 * weight : 0.08 + 0.5 * weight,
  }, parent);
}

function drawNode(node, top, parent) {
  const effect = node.total[state.target], share = Math.sqrt(Math.min(1, Math.abs(effect) / top));
  const type = isNeuron(node) ? "" : node.kind === "embedding" ? " token" : node.kind === "logit" ? " logit" : " bias";
  const classes = `node${type}${effect < 0 ? " minus" : ""}${node.id === state.picked ? " picked" : ""}${near(node) ? "" : " faded"}`;
  const group = element("g", { class: classes, tabindex: 0, role: "button", "aria-label": describe(node), transform: `translate(${node.x},${node.y})` }, parent);
  if (node.kind === "embedding") {
    const word = node.label.trim() || "\u2423", width = word.length * 7.5 + 14;
    element("rect", { class: "mark", x: -width / 2, y: -10, width, height: 20, rx: 5 }, group);
    element("text", { "text-anchor": "middle", y: 4 }, group, word);
  } else if (node.kind === "logit") {
    element("circle", { class: "mark", r: 7 }, group);
    element("text", { x: 13, y: 4 }, group, `${node.label} ${number(node.activation)}`);
  } else if (isNeuron(node)) {
    element("circle", { class: "mark", r: 2.6 + 5.2 * share, "fill-opacity": 0.35 + 0.65 * share }, group);
  } else {
    element("rect", { class: "mark", x: -3.5, y: -3.5, width: 7, height: 7 }, group);
  }
  group.addEventListener("pointerenter", (event) => showTip(node, event.clientX, event.clientY));
  group.addEventListener("pointerleave", () => { tip.hidden = true; });
  group.addEventListener("focus", () => { const box = group.getBoundingClientRect(); showTip(node, box.right, box.top); });
  group.addEventListener("blur", () => { tip.hidden = true; });
  group.addEventListener("click", () => { if (!dragged) pick(node.id); });
  group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(node.id, true); } });
  node.mark = group;
}

const token = (node) => header.tokens[node.position];
function describe(node) {
  if (node.kind === "logit") return `target ${node.label}, value ${number(node.activation)}`;
  const where = isNeuron(node) ? `${node.label} at token ${node.position} "${token(node)}"` : node.label;
  return `${where}, effect ${number(node.total[state.target])} on ${header.targets[state.target]}`;
}

function showTip(node, x, y) {
  const lines = [html("b", { textContent: isNeuron(node) ? `${node.label} at "${token(node)}"` : node.label })];
  if (isNeuron(node)) lines.push(html("div", { textContent: `activation ${number(node.activation)}` }));
  if (node.kind !== "logit") lines.push(html("div", { textContent: `effect on ${header.targets[state.target]}: ${number(node.total[state.target])}` }));
  if (node.note) lines.push(html("div", { className: "words", textContent: node.note }));
  tip.replaceChildren(...lines);
  tip.hidden = false;
  tip.style.left = `${Math.min(x + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(y + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

function pick(id, focus) {
  state.picked = state.picked === id ? null : id;
  tip.hidden = true;
  if (state.picked !== null && isNeuron(nodes[id]) && !nodes[id].shown) setCount(ranked.indexOf(nodes[id]) + 1);
  draw();
  fillPanel();
  if (focus && nodes[id].mark) nodes[id].mark.focus();
}

function edgeList(title, list, other) {
  if (!list.length) return [];
  const most = list[0].share || 1, items = list.slice(0, 40).map((edge) => {
    const node = nodes[other(edge)], name = isNeuron(node) ? `${node.label} at ${token(node)}` : node.label;
    const bar = html("span", { className: `bar ${edge.weight < 0 ? "minus" : "plus"}` });
    bar.style.width = `${Math.max(2, (100 * edge.share) / most)}%`;
    const button = html("button", { type: "button" }, html("span", { textContent: name }), html("span", { textContent: number(edge.weight) }), bar);
    button.addEventListener("click", () => pick(node.id, true));
    return html("li", {}, button);
  });
  return [html("h3", { textContent: `${title} (${list.length})` }), html("ul", { className: "list" }, ...items)];
}

function facts(pairs) {
  return html("dl", {}, ...pairs.flatMap(([name, value]) => [html("dt", { textContent: name }), html("dd", { textContent: value })]));
}

function fillPanel() {
  if (state.picked === null) {
    const heading = html("h2", { textContent: "Strongest neurons" });
    const most = ranked.length ? strength(ranked[0]) : 1;
    const items = ranked.slice(0, 40).map((node) => {
      const bar = html("span", { className: `bar ${node.total[state.target] < 0 ? "minus" : "plus"}` });
      bar.style.width = `${(100 * strength(node)) / most}%`;
      const button = html("button", { type: "button" }, html("span", { textContent: `${node.label} at ${token(node)}` }),
        html("span", { textContent: number(node.total[state.target]) }), bar);
      button.addEventListener("click", () => pick(node.id, true));
      return html("li", {}, button);
    });
    const targets = header.targets.map((name, k) => [name, `${number(header.target_values[k])}  p ${percent(header.target_probabilities[k])}`]);
    panel.replaceChildren(heading, html("p", { className: "words", textContent: `by effect on ${header.targets[state.target]}` }),
      html("ul", { className: "list" }, ...items), html("h3", { textContent: `targets (${header.metric})` }), facts(targets));
    return;
  }
  const node = nodes[state.picked];
  const rows = isNeuron(node) || node.kind === "logit" ? [["activation", number(node.activation)]] : [];
  if (node.kind !== "logit") header.targets.forEach((name, k) => rows.push([`effect on ${name}`, number(node.total[k])]));
  if (isNeuron(node)) rows.push(["token", `${token(node)} (${node.position})`], ["layer", node.layer], ["neuron", node.index]);
  if (node.ins.length) rows.push(["from outside the graph", number(node.remainder)]);
  const note = node.note ? [html("p", { className: "words", textContent: node.note })] : [];
  panel.replaceChildren(html("h2", { textContent: node.label }), ...note, facts(rows),
    ...edgeList("from", node.ins, (edge) => edge.source), ...edgeList("to", node.outs, (edge) => edge.target));
  panel.scrollTop = 0;
}

function setCount(count) { state.count = count; byId("count").value = count; }

let dragged = false;
function navigate() {
  let from = null;
  plot.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = plot.getBoundingClientRect(), factor = Math.exp(Math.max(-0.4, Math.min(0.4, event.deltaY * 0.0015)));
    const x = view.x + ((event.clientX - box.left) / box.width) * view.w, y = view.y + ((event.clientY - box.top) / box.height) * view.h;
    view = { x: x - (x - view.x) * factor, y: y - (y - view.y) * factor, w: view.w * factor, h: view.h * factor };
    setView();
  }, { passive: false });
  plot.addEventListener("pointerdown", (event) => { from = { x: event.clientX, y: event.clientY, view: { ...view } }; dragged = false; });
  addEventListener("pointermove", (event) => {
    if (!from) return;
    const box = plot.getBoundingClientRect(), dx = event.clientX - from.x, dy = event.clientY - from.y;
    if (Math.hypot(dx, dy) > 4) { dragged = true; plot.classList.add("moving"); }
    if (dragged) { view = { ...view, x: from.view.x - (dx / box.width) * view.w, y: from.view.y - (dy / box.height) * view.h }; setView(); }
  });
  addEventListener("pointerup", () => { from = null; plot.classList.remove("moving"); });
  addEventListener("keydown", (event) => { if (event.key === "Escape" && state.picked !== null) pick(state.picked); });
  addEventListener("resize", fit);
}

function controls() {
  header.targets.forEach((name, k) => byId("target").append(html("option", { value: k, textContent: name })));
  byId("target").addEventListener("input", (event) => { state.target = Number(event.target.value); draw(); fillPanel(); });
  Object.assign(byId("count"), { max: ranked.length, value: state.count });
  byId("count").addEventListener("input", (event) => { state.count = Number(event.target.value); draw(); });
  Object.assign(byId("edges"), { max: edges.length, value: state.edges });
  byId("edges").addEventListener("input", (event) => { state.edges = Number(event.target.value); draw(); });
  byId("names").append(...nodes.map((node) => html("option", { value: node.label })));
  byId("find").addEventListener("change", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    const found = nodes.filter((node) => wanted && node.label.toLowerCase().includes(wanted)).sort((a, b) => strength(b) - strength(a))[0];
    if (found && found.id !== state.picked) pick(found.id, true);
  });
  byId("fit").addEventListener("click", fit);
  byId("clear").addEventListener("click", () => { if (state.picked !== null) pick(state.picked); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
}

byId("title").textContent = document.title;
byId("summary").textContent = `${header.model}: ${ranked.length} neurons keep ${percent(header.node_mass_kept)} of the absolute effect, ` +
  `${edges.length} direct edges ${percent(header.edge_mass_kept)}; relevance conserved to ${header.conservation_error.toExponential(0)}.`;
controls();
navigate();
draw();
fit();
fillPanel();
