// The side panel: details of what is picked, the list of nodes (the graph for those who do not see the canvas), and
// what steering does.
function html(tag, properties = {}, ...children) {
  const { on = {}, aria = {}, ...plain } = properties, made = Object.assign(document.createElement(tag), plain);
  for (const [name, act] of Object.entries(on)) made.addEventListener(name, act);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(name === "role" ? name : `aria-${name}`, value);
  made.append(...children);
  return made;
}
const say = (what) => { byId("said").textContent = what; };
const facts = (pairs) => html("dl", {}, ...pairs.flatMap(([name, value]) => [html("dt", { textContent: name }), html("dd", { textContent: value })]));
const button = (name, act, properties = {}) => html("button", { type: "button", textContent: name, on: { click: act }, ...properties });

// One line of a list: name, figure, and a bar of the share; a click picks the thing.
function line(item, figure, share, minus) {
  const bar = html("span", { className: `bar ${minus ? "minus" : "plus"}` });
  bar.style.width = `${Math.max(1.5, 100 * Math.min(1, share))}%`;
  const made = html("button", { type: "button", on: { click: () => pick(item), mouseenter: () => glance(item), mouseleave: () => glance(null) } },
    html("span", { className: "name", textContent: nameOf(item) }), html("span", { textContent: figure }), bar);
  if (item === state.picked) made.setAttribute("aria-current", "true");
  return html("li", {}, made);
}
const LONG = 60;
function list(lines, more) {
  const made = html("ul", { className: "list" }, ...lines.slice(0, more ?? LONG).map((make) => make()));
  const rest = lines.length - (more ?? LONG);
  if (rest > 0) made.append(html("li", {}, button(`${rest} more`, () => made.replaceWith(list(lines, Infinity)), { className: "more" })));
  return made;
}

const MANY = 64; // tokens: of longer prompts, those that count
// The prompt with each token's part of the thing: in colour, in figures, and as a table for those who hear it.
function tokenTable(item) {
  const map = tokenMap(item);
  if (!map) return [];
  const top = Math.max(1e-30, ...map.values.map(Math.abs));
  const all = map.values.length <= MANY, shown = [...map.values.keys()].filter((position) => all || map.values[position]);
  const rows = shown.map((position) => {
    const value = map.values[position];
    const cell = html("span", { textContent: value ? signed(value) : "\u00b7", aria: { role: "cell" } });
    const name = html("span", { textContent: word(header.tokens[position]), aria: { role: "rowheader" } });
    const row = html("span", { className: value < 0 ? "minus" : "plus", aria: { role: "row" } }, name, cell);
    row.style.setProperty("--share", (Math.abs(value) / top).toFixed(3));
    return row;
  });
  const title = item.members ? "from tokens, as flow to the target" : item.kind === "logit" ? "from tokens" : "its activation from tokens";
  const other = item.members ? 0 : item.activation - map.sum, felt = Math.abs(other) > 1e-5 * Math.abs(map.sum);
  const rest = [["all tokens", signed(map.sum)], ...(felt ? [["biases and positions", signed(other)]] : [])];
  return [html("h3", { textContent: title }), html("div", { className: "tokens", aria: { role: "table", label: title } }, ...rows), facts(rest)];
}

function edgeList(title, links, end) {
  if (!links.length) return [];
  const most = links[0].share || 1;
  const lines = links.map((link) => () => line(link[end], link.weight === null ? `${signed(link.flow)} \u21d2` : signed(link.weight), link.share / most, toneOf(link)));
  return [html("h3", { textContent: `${title} (${links.length})` }), list(lines, 25)];
}

function details() {
  const item = state.picked;
  if (!item) return overview();
  const k = state.target, rows = [];
  if (item.members) rows.push(["nodes", String(item.members.size)]);
  else if (ranks(item) || item.kind === "logit") rows.push(["activation", number(item.activation)]);
  if (item.kind !== "logit") header.targets.forEach((name, i) => rows.push([`effect on ${word(name)}`, `${signed(effect(item, i))}  (${percent(Math.abs(effect(item, i)) / scaleOf(i))})`]));
  if (!item.members && ranks(item)) rows.push(["token", `${word(token(item))} (${item.position})`], ["layer", String(item.layer)], ["index", String(item.index)]);
  if (!item.members && item.own) rows.push(["from its own biases", signed(item.own)]);
  if (!item.members && item.ins.length) rows.push(["from outside of the graph", signed(item.remainder)]);
  const links = scene.links, into = links.filter((link) => link.target === item), outOf = links.filter((link) => link.source === item);
  return [
    html("h2", { textContent: nameOf(item) }),
    ...(item.note ? [html("p", { className: "words", textContent: item.note })] : []),
    facts(rows),
    ...tokenTable(item),
    ...(item.members ? supernodeEditor(item) : memberActions(item)),
    ...steering(item, k),
    ...edgeList(item.members ? "from, as flow to the target" : "from", into, "source"),
    ...edgeList(item.members ? "to, as flow to the target" : "to", outOf, "target"),
  ];
}
function overview() {
  const targets = header.targets.map((name, k) => [word(name), `${number(header.target_values[k])}   p ${percent(header.target_probabilities[k])}`]);
  return [
    html("h2", { textContent: "This graph" }),
    facts([["model", header.model.split("/").at(-1)], ["targets", header.metric], ["reference", header.reference], ["nodes", String(nodes.length)], ["edges", String(edges.length)],
      ["relevance conserved to", header.conservation_error.toExponential(0).replace("-", MINUS)]]),
    html("h3", { textContent: "targets" }), facts(targets),
    html("h3", { textContent: "strongest" }),
    nodeList(ranked.filter((node) => node.shown).slice(0, 12)),
    html("h3", { textContent: "how to" }),
    facts([["pick a node", "click, or arrows and Enter"], ["group nodes", "shift-click or m, then g"], ["fold, unfold", "double click or f"],
      ["find", "/"], ["zoom, all", "wheel or + " + MINUS + ", 0"], ["back", "Escape"]]),
  ];
}
function nodeList(items) {
  const k = state.target, most = Math.max(1e-30, ...items.map((item) => Math.abs(effect(item, k))));
  return list(items.map((item) => () => line(item, item.kind === "logit" ? number(item.activation) : signed(effect(item, k)), Math.abs(effect(item, k)) / most, effect(item, k) < 0)));
}
function nodesTab() {
  const matches = state.matches ? scene.items.filter((item) => state.matches.has(item)) : scene.items;
  const items = [...matches].sort((a, b) => strengthOf(b) - strengthOf(a));
  const title = state.matches ? `${items.length} found` : `${items.length} nodes by effect`;
  return [html("h2", { id: "nodes-title", textContent: title }), nodeTable(items)];
}
// What the drawing shows, as a table: where a thing is, its value, its effect; the strongest first.
function nodeTable(items, most = LONG) {
  const head = ["node", "layer", "activation", `effect on ${word(header.targets[state.target])}`].map((name) => html("th", { scope: "col", textContent: name }));
  const made = html("table", { aria: { labelledby: "nodes-title" } }, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...items.slice(0, most).map(nodeRow)));
  const rest = items.length - most;
  return rest > 0 ? html("div", {}, made, button(`${rest} more`, (event) => event.target.parentElement.replaceWith(nodeTable(items, Infinity)), { className: "more" })) : made;
}
function nodeRow(item) {
  const name = button(nameOf(item), () => pick(item), { className: "link name" }), figure = (text, minus) => html("td", { textContent: text, className: minus ? "lowers" : "" });
  if (item === state.picked) name.setAttribute("aria-current", "true");
  const valued = !item.members && (ranks(item) || item.kind === "logit"), value = effect(item, state.target);
  const layer = item.kind === "logit" ? "output" : item.members ? "several" : item.layer < 0 ? "tokens" : String(item.layer);
  return html("tr", { on: { mouseenter: () => glance(item), mouseleave: () => glance(null) } }, html("th", { scope: "row" }, name),
    figure(layer), figure(valued ? number(item.activation) : ""), figure(item.kind === "logit" ? "" : signed(value), value < 0));
}

// What happens to the targets when the thing is scaled in the model itself.
const FACTORS = [["0", "ablate"], ["-1", "flip"], ["2", "double"]];
const membersKey = (item) => (item.members ? [...item.members] : [item]).map((node) => node.id).sort((a, b) => a - b).join();
const known = new Map(data.effects.map((one) => [[...one.nodes].sort((a, b) => a - b).join(), one.outcomes]));
function steering(item) {
  const heading = html("h3", { textContent: "in the model" });
  const why = item.kind === "logit" ? "A target is what is read: there is nothing to scale." : data.refusal && `${data.refusal[0].toUpperCase()}${data.refusal.slice(1)}.`;
  if (why) return [heading, html("p", { className: "words", textContent: why })];
  const outcomes = known.get(membersKey(item)), shown = html("div", { className: "outcome", aria: { live: "polite" } });
  const act = (factor) => (outcomes?.[factor] ? showOutcome(shown, outcomes[factor]) : steerLive(item, factor, shown));
  const buttons = FACTORS.filter(([factor]) => data.live || outcomes?.[factor]).map(([factor, name]) => button(`${name} \u00d7${tidy(factor)}`, () => act(factor)));
  if (!buttons.length) return [heading, html("p", { className: "words", textContent: "Not computed beforehand for this one; `circuits view` computes it live." })];
  if (data.live) buttons.push(ownFactor((factor) => steerLive(item, factor, shown)));
  return [heading, html("div", { className: "row" }, ...buttons), shown];
}
function ownFactor(act) {
  const field = html("input", { type: "number", step: "0.5", value: "3", aria: { label: "factor" } });
  return html("span", { className: "row" }, field, button("scale", () => act(field.value)));
}
function showOutcome(place, outcome) {
  const rows = header.targets.map((name, k) => {
    const change = outcome.changes[k], share = Math.abs(change) / scaleOf(k);
    const bar = html("span", { className: `bar ${change < 0 ? "minus" : "plus"}` });
    bar.style.width = `${Math.max(1.5, 100 * Math.min(1, share))}%`;
    const figure = `${number(header.target_values[k])} \u2192 ${number(header.target_values[k] + change)}`;
    return html("li", {}, html("span", { className: "name", textContent: word(name) }), html("span", { textContent: figure }), bar);
  });
  const says = outcome.top.map(({ token: what, probability }) => `${word(what)} ${percent(probability)}`).join("   ");
  place.replaceChildren(html("ul", { className: "list" }, ...rows), html("p", { className: "words", textContent: `The model then says: ${says}` }));
}
async function steerLive(item, factor, place) {
  place.textContent = "running the model \u2026";
  const parts = item.members ? [...item.members] : [item];
  const answer = await post("edit", { nodes: parts.map((node) => [node.kind, node.layer, node.position, node.index]), factor: Number(factor) });
  if (answer.error) place.textContent = answer.error;
  else showOutcome(place, answer);
}
async function post(what, body) {
  try {
    const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const answer = await (await fetch(`${data.live}/${what}`, request)).json();
    return answer.detail ? { error: JSON.stringify(answer.detail) } : answer;
  } catch (error) {
    return { error: `The server does not answer (${error.message}); is circuits view still running?` };
  }
}
