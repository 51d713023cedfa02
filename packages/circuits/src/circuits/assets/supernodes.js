// Supernodes, in their file's form: a label and places [layer, position or null for every position, neuron, sign or 0].
// `groups` are all of the file, in its order; `supernodes` those of them with neurons in this graph, which are drawn. A
// group keeps its places as the file has them (only a node that is taken out narrows the place that named it), and the
// rest of the file, which says how a clustering found them, is kept as it is: so reading and writing lose nothing.
let groups = [], supernodes = [], provenance = {};
const neuronKey = (layer, neuron) => `${layer}/${neuron}`;
const neurons = new Map();
for (const node of nodes.filter((one) => one.kind === "neuron")) {
  const key = neuronKey(node.layer, node.index);
  neurons.set(key, [...(neurons.get(key) ?? []), node]);
}
const signOf = (node) => (node.activation < 0 ? -1 : 1);
function resolve([layer, position, neuron, sign]) {
  const fits = (node) => (position === null || node.position === position) && (!sign || signOf(node) === sign);
  return (neurons.get(neuronKey(layer, neuron)) ?? []).filter(fits);
}
const place4 = (node) => [node.layer, node.position, node.index, signOf(node)];

// A node that several supernodes name is drawn in the last of them.
function assign() {
  for (const node of nodes) node.super = null;
  for (const one of groups) for (const node of one.places.flatMap(resolve)) node.super = one;
  for (const one of groups) one.members = new Set(nodes.filter((node) => node.super === one));
  supernodes = groups.filter((one) => one.members.size);
}
function addSupernode(label, members) {
  const made = { label, places: [], folded: true, support: null };
  groups.push(made);
  for (const node of members) addTo(made, node);
  return made;
}
function removeSupernode(gone) {
  groups = groups.filter((one) => one !== gone);
  assign();
}
function addTo(one, node) {
  if (node.super) takeOut(node.super, node);
  Object.assign(one, { places: [...one.places, place4(node)], support: null });
  assign();
}
function takeOut(one, node) {
  const without = (place) => (resolve(place).includes(node) ? resolve(place).filter((other) => other !== node).map(place4) : [place]);
  Object.assign(one, { places: one.places.flatMap(without), support: null });
  if (one.places.length) assign();
  else removeSupernode(one);
}
function readSupernodes(content, folded = false) {
  const { supernodes: rows, support = [], ...rest } = content ?? {};
  if (!Array.isArray(rows)) throw new Error("it holds no list \"supernodes\"");
  const places = rows.map((row) => row?.nodes);
  if (!places.every((one) => Array.isArray(one) && one.every((place) => Array.isArray(place) && place.length === 4))) {
    throw new Error("a supernode's \"nodes\" are lists of layer, position, neuron and sign");
  }
  groups = rows.map(({ label }, i) => ({ label: String(label), places: places[i], folded, support: support[i] ?? null }));
  provenance = rest;
  assign();
}
const writtenSupernodes = () => ({
  supernodes: groups.map(({ label, places }) => ({ label, nodes: places })),
  ...provenance,
  support: groups.some((one) => one.support !== null) ? groups.map((one) => one.support) : [],
});
