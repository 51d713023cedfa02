// What the page shows: nodes, edges, their strengths, strongest paths, and supernodes, out of the embedded data.
const data = JSON.parse(document.getElementById("data").textContent);
const { header } = data;
const MINUS = "\u2212";

const byId = (id) => document.getElementById(id);
const sum = (list, value) => list.reduce((total, item) => total + value(item), 0);
const tidy = (text) => text.replace("-", MINUS);
function number(x) {
  const size = Math.abs(x);
  if (size === 0) return "0";
  return tidy(size >= 100 ? x.toFixed(0) : size >= 0.0995 ? x.toFixed(2) : size >= 1e-3 ? x.toFixed(4) : x.toExponential(1));
}
const signed = (x) => (x > 0 ? `+${number(x)}` : number(x));
const percent = (x) => `${(100 * x).toFixed(x >= 0.0995 ? 0 : x >= 0.00095 ? 1 : 2)} %`;
// Tokens are shown with their white space visible where nothing else is left.
const word = (token) => token.trim().replace(/\s+/g, " ") || token.replace(/ /g, "\u2423").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";

const FIXED = new Set(["embedding", "position", "attn_bias", "mlp_bias", "logit"]); // in every graph; the others are ranked
const ranks = (node) => !FIXED.has(node.kind);
const nodes = data.nodes.map((node, id) => ({
  ...node, id, ins: [], outs: [], strength: sum(node.total, Math.abs), super: null, shown: true,
}));

// The effect on target k of one unit of a node's value: with it an edge's weight becomes a share of that target.
function unit(node, k) {
  if (node.kind === "logit") return node.index === k ? 1 : 0;
  return node.activation ? node.total[k] / node.activation : 0;
}
const flow = (edge, k) => edge.weight * unit(edge.target, k);
const edges = data.edges.source.map((source, i) => {
  const target = nodes[data.edges.target[i]], weight = data.edges.weight[i];
  const per = target.kind === "logit" ? 1 : target.strength / Math.max(Math.abs(target.activation), 1e-30);
  return { source: nodes[source], target, weight, share: Math.abs(weight) * per };
}).sort((a, b) => b.share - a.share);
for (const edge of edges) { edge.source.outs.push(edge); edge.target.ins.push(edge); } // both lists: strongest first
const ranked = nodes.filter(ranks).sort((a, b) => b.strength - a.strength);
ranked.forEach((node, rank) => { node.rank = rank; });
const nodeMass = sum(ranked, (node) => node.strength), edgeMass = sum(edges, (edge) => edge.share);
const scaleOf = (k) => Math.abs(header.target_values[k]) || 1;

const token = (node) => header.tokens[node.position] ?? "";
function nameOf(item) {
  if (item.members) return item.label;
  if (item.kind === "embedding" || item.kind === "logit") return word(item.label);
  return ranks(item) ? `${item.label} at ${word(token(item))}` : item.label;
}
function sentence(item, k) {
  if (item.kind === "logit") return `Target ${nameOf(item)}, value ${number(item.activation)}`;
  const parts = item.members ? `Supernode ${item.label} of ${item.members.size} nodes` : nameOf(item);
  return `${parts}, effect ${signed(effect(item, k))} on ${header.targets[k]}`;
}
const effect = (item, k) => (item.members ? sum([...item.members], (node) => node.total[k]) : item.total[k]);
const strengthOf = (item) => (item.members ? sum([...item.members], (node) => node.strength) : item.strength);

// How much of a neuron's activation, or of a target, each token gives (of a supernode: of its effect on target k).
function tokenMap(item, k = state.target) {
  const members = item.members ? [...item.members] : [item];
  if (!members.every((node) => node.tokens.length)) return null;
  const add = (at) => sum(members, (node) => node.tokens[at] * (item.members ? unit(node, k) : 1));
  return { values: header.tokens.map((_, at) => add(at)), sum: add(header.tokens.length) };
}

// Strongest paths. `up` is a node's best chain of edges from an input, `down` its best chain to a target; a chain's
// worth is the product, over its edges, of the part that the edge has in all that its target receives.
function order() {
  const waiting = nodes.map((node) => node.ins.length), ready = nodes.filter((node) => !node.ins.length), sorted = [];
  while (ready.length) {
    const node = ready.pop();
    sorted.push(node);
    for (const edge of node.outs) if (--waiting[edge.target.id] === 0) ready.push(edge.target);
  }
  return sorted;
}
for (const node of nodes) {
  const received = sum(node.ins, (edge) => Math.abs(edge.weight)) + Math.abs(node.remainder);
  for (const edge of node.ins) edge.part = Math.abs(edge.weight) / (received || 1);
}
const sorted = order(), up = [], down = [];
const best = (list, worth) => list.reduce((found, edge) => {
  const value = worth(edge);
  return value > found.value ? { value, edge } : found;
}, { value: 0, edge: null });
for (const node of sorted) up[node.id] = node.ins.length ? best(node.ins, (e) => e.part * up[e.source.id].value) : { value: 1, edge: null };
for (const node of sorted.reverse()) {
  down[node.id] = node.kind === "logit" ? { value: 1, edge: null } : best(node.outs, (e) => e.part * down[e.target.id].value);
}
function pathsThrough(node, width = 3) {
  const found = new Set();
  const follow = (list, chain, end, worth) => {
    for (let edge of [...list].sort((a, b) => worth(b) - worth(a)).slice(0, width)) {
      for (; edge && !found.has(edge); edge = chain[edge[end].id].edge) found.add(edge);
    }
  };
  follow(node.ins, up, "source", (e) => e.part * up[e.source.id].value);
  follow(node.outs, down, "target", (e) => e.part * down[e.target.id].value);
  return found;
}
