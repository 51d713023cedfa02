// Drawing on one canvas: `rebuild` decides what there is to draw, `paint` draws it under the current zoom.
const canvas = byId("plot"), pen = canvas.getContext("2d");
const state = { target: 0, count: 0, edges: 0, picked: null, focus: null, over: null, marked: new Set(), matches: null };
let scene = { items: [], links: [], chosen: [], near: null, world: { columns: [], rows: [], width: 1, height: 1 } };
let view = { x: 0, y: 0, k: 1 }, size = { width: 1, height: 1 }, ink = {};
const AXIS = { left: 62, bottom: 30, slanted: false };
const room = () => ({ x: Math.max(1, size.width - AXIS.left - 16), y: Math.max(1, size.height - AXIS.bottom - 12) });

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["page", "card", "ink", "soft", "line", "plus", "minus", "pick"]) ink[name] = style.getPropertyValue(`--${name}`).trim();
  ink.groups = [1, 2, 3, 4].map((i) => style.getPropertyValue(`--group${i}`).trim());
}
const groupColour = (one) => ink.groups[supernodes.indexOf(one) % ink.groups.length];

function rebuild() {
  ranked.forEach((node) => { node.shown = node.rank < state.count; });
  const items = visibleItems(), world = layOut(items), links = visibleLinks(state.target);
  if (state.picked && !items.includes(state.picked)) state.picked = null;
  if (state.focus && !items.includes(state.focus)) state.focus = null;
  if (state.over && !items.includes(state.over)) state.over = null;
  const chosen = state.picked ? chosenLinks(links) : links.slice(0, state.edges);
  scene = { items, links, chosen, world, near: state.picked ? nearOf(chosen) : null, top: topEffect(items) };
  keptMass(items, links);
  redrawEdges();
  paint();
}

// Of what is picked: its strongest edges (a quarter of the slider's number), and the strongest paths through it.
function chosenLinks(links) {
  const members = state.picked.members ? [...state.picked.members] : [state.picked];
  const paths = new Set(members.sort((a, b) => b.strength - a.strength).slice(0, 3).flatMap((node) => [...pathsThrough(node)]));
  const pairs = new Set([...paths].map((edge) => `${keyOf(itemOf(edge.source))}>${keyOf(itemOf(edge.target))}`));
  const touches = (link) => link.source === state.picked || link.target === state.picked;
  const own = links.filter(touches).slice(0, Math.max(20, Math.round(state.edges / 4)));
  return [...own, ...links.filter((link) => !touches(link) && pairs.has(`${keyOf(link.source)}>${keyOf(link.target)}`))];
}
const nearOf = (chosen) => new Set([state.picked, ...chosen.flatMap((link) => [link.source, link.target])]);
const topEffect = (items) => Math.max(1e-30, ...items.filter((item) => item.kind !== "logit" && !item.members).map((item) => Math.abs(effect(item, state.target))));

let asked = false;
function paint() { // at most once a frame
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; paintNow(); });
}
function paintNow() {
  const ratio = devicePixelRatio || 1;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, size.width, size.height);
  bands();
  pen.save();
  pen.beginPath();
  pen.rect(AXIS.left, 0, size.width - AXIS.left, size.height - AXIS.bottom);
  pen.clip();
  edgesUnderView();
  pen.transform(view.k, 0, 0, view.k, view.x, view.y);
  hulls();
  pen.textBaseline = "middle";
  for (const item of scene.items) if (inSight(item)) (item.members ? drawPill : drawNode)(item);
  pen.restore();
  layerNames();
  tokenNames();
}

const toScreen = (item) => ({ x: item.x * view.k + view.x, y: item.y * view.k + view.y });
function inSight(item) {
  const { x, y } = toScreen(item), margin = 160 * view.k;
  return x > -margin && y > -margin && x < size.width + margin && y < size.height + margin;
}
const dimmed = (item) => (state.matches ? !state.matches.has(item) : scene.near ? !scene.near.has(item) : false);
const radius = (item) => (ranks(item) ? 2.9 + 5.5 * Math.sqrt(Math.min(1, Math.abs(effect(item, state.target)) / scene.top)) : item.kind === "logit" ? 7 : 5);
function drawNode(node) {
  const r = radius(node), minus = ranks(node) && effect(node, state.target) < 0;
  pen.globalAlpha = dimmed(node) ? 0.14 : 1;
  pen.beginPath();
  if (!ranks(node) && node.kind !== "logit") pen.roundRect(node.x - r, node.y - r, 2 * r, 2 * r, 2.5);
  else if (minus) for (const [dx, dy] of [[0, -1], [1, 0], [0, 1], [-1, 0]]) pen.lineTo(node.x + 1.25 * r * dx, node.y + 1.25 * r * dy);
  else pen.arc(node.x, node.y, r, 0, 7);
  pen.closePath();
  pen.fillStyle = ranks(node) ? (minus ? ink.minus : ink.plus) : node.kind === "logit" ? ink.ink : node.kind === "embedding" ? ink.page : ink.soft;
  pen.fill();
  if (view.k > 0.6 || !ranks(node)) { // below, the rim is thinner than a pixel
    pen.lineWidth = 1.2;
    pen.strokeStyle = node.kind === "embedding" ? ink.ink : ink.page;
    pen.stroke();
  }
  if (node.kind === "logit") text(`${nameOf(node)}  ${number(node.activation)}`, node.x + 7 + 7 / view.k, node.y, ink.ink, (header.targets.length > 1 ? Math.min(13, 1.3 * STEP * view.k) : 13) / view.k, 600);
  else if (ranks(node) && view.k > 1.9) text(node.label.replace(/[LN+-]/g, ""), node.x, node.y + r + 4.5, ink.soft, 4.4, 400, "center");
  rings(node, (extra) => { pen.beginPath(); pen.arc(node.x, node.y, r + extra, 0, 7); });
  pen.globalAlpha = 1;
}
function drawPill(item) {
  const { x, y, width } = item, colour = groupColour(item);
  pen.globalAlpha = dimmed(item) ? 0.2 : 1;
  pen.beginPath();
  pen.roundRect(x - width / 2, y - 10, width, 20, 10);
  pen.fillStyle = ink.page;
  pen.fill();
  pen.strokeStyle = colour;
  pen.lineWidth = 1.6;
  pen.stroke();
  text(item.label, x - 7, y, ink.ink, 11.5, 600, "center");
  text(String(item.members.size), x + width / 2 - 9, y, ink.soft, 10, 400, "right");
  rings(item, (extra) => { pen.beginPath(); pen.roundRect(x - width / 2 - extra, y - 10 - extra, width + 2 * extra, 20 + 2 * extra, 10 + extra); });
  pen.globalAlpha = 1;
}
function rings(item, outline) {
  if (item === state.picked || state.marked.has(item)) { outline(2.5); pen.strokeStyle = ink.pick; pen.lineWidth = 2; pen.stroke(); }
  if (item === state.focus && document.activeElement === canvas) { outline(6); pen.strokeStyle = ink.pick; pen.lineWidth = 1.4; pen.setLineDash([3, 2.5]); pen.stroke(); pen.setLineDash([]); }
  if (state.matches?.has(item)) { outline(4); pen.strokeStyle = ink.pick; pen.lineWidth = 1.2; pen.stroke(); }
}
function text(what, x, y, colour, points, weight = 400, align = "left") {
  pen.font = `${weight} ${points}px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif`;
  pen.textAlign = align;
  pen.textBaseline = "middle";
  pen.fillStyle = colour;
  pen.fillText(what, x, y);
}

// Open supernodes: a halo of their colour behind each member, and the name above the highest one, clear of other names.
function hulls() {
  const taken = [];
  for (const one of supernodes.filter((item) => !item.folded)) {
    const members = [...one.members].filter((node) => node.shown);
    if (!members.length) continue;
    pen.fillStyle = groupColour(one);
    pen.globalAlpha = 0.4;
    for (const node of members) { pen.beginPath(); pen.arc(node.x, node.y, radius(node) + 4, 0, 7); pen.fill(); }
    pen.globalAlpha = 1;
    const highest = members.reduce((top, node) => (node.y < top.y ? node : top));
    const place = { x: highest.x, y: highest.y - 15, wide: one.label.length * 6.2 };
    const clash = (other) => Math.abs(other.x - place.x) < (other.wide + place.wide) / 2 && Math.abs(other.y - place.y) < 12;
    while (taken.some(clash)) place.y -= 12;
    taken.push(place);
    text(one.label, place.x, place.y, ink.ink, 10.5, 600, "center");
  }
}

function bands() {
  pen.fillStyle = ink.card;
  scene.world.rows.forEach((row, r) => {
    if (r % 2) pen.fillRect(0, row.y * view.k + view.y, size.width, row.height * view.k);
  });
}
// The names of layers and tokens stay in sight at the edges.
function layerNames() {
  let free = Infinity;
  scene.world.rows.forEach((row, r) => {
    const y = (row.y + row.height / 2) * view.k + view.y;
    if (y < 8 || y > Math.min(size.height - AXIS.bottom - 6, free)) return;
    text(r === 0 ? "tokens" : r > header.n_layers ? "output" : `layer ${r - 1}`, 10, y, ink.soft, 11.5);
    free = y - 15;
  });
}
// The tokens have the colour of what they give to the thing under the pointer, or to what is picked.
function tokenNames() {
  const item = state.over ?? state.picked, map = item && tokenMap(item), top = map && Math.max(1e-30, ...map.values.map(Math.abs));
  const y = size.height - AXIS.bottom;
  pen.fillStyle = ink.page;
  pen.fillRect(0, y, size.width, AXIS.bottom);
  pen.fillStyle = ink.line;
  pen.fillRect(AXIS.left, y, size.width, 1);
  header.tokens.forEach((what, position) => {
    const column = scene.world.columns[position], x = (column.x + column.width / 2) * view.k + view.x;
    if (x < AXIS.left || x > size.width) return;
    if (map) tint(map.values[position] / top, x - (column.width * view.k) / 2, y, column.width * view.k);
    const wide = column.width * view.k, name = word(what);
    if (AXIS.slanted) slanted(name, x, y, wide);
    else text(shortened(name, Math.floor((wide - 6) / LETTER)), x, y + AXIS.bottom / 2 + 1, ink.ink, 12.5, 500, "center");
  });
}

const shortened = (name, letters) => (name.length > letters ? `${name.slice(0, Math.max(0, letters - 1))}\u2026` : name);
const fits = (name, wide) => name.length * LETTER + 6 <= wide;
function slanted(name, x, y, wide) {
  if (wide < 9) return; // too narrow even so
  pen.save();
  pen.translate(x + 3, y + 7);
  pen.rotate(-0.8);
  text(shortened(name, 9), 0, 0, ink.ink, 11.5, 500, "right");
  pen.restore();
}

// A bar of the share (a broken one where it is negative) under a wash of the colour.
function tint(share, x, y, width) {
  pen.fillStyle = share < 0 ? ink.minus : ink.plus;
  pen.globalAlpha = 0.34 * Math.abs(share);
  pen.fillRect(x + 1, y + 1, width - 2, AXIS.bottom - 1);
  pen.globalAlpha = 1;
  const long = (width - 4) * Math.abs(share), dash = share < 0 ? 5 : long;
  for (let at = 0; at < long; at += dash + 2) pen.fillRect(x + (width - long) / 2 + at, y + AXIS.bottom - 3, Math.min(dash, long - at), 3);
}

function resize() {
  const box = canvas.parentElement.getBoundingClientRect(), ratio = devicePixelRatio || 1;
  size = { width: Math.round(box.width), height: Math.round(box.height) }; // whole pixels: strips are painted over
  Object.assign(canvas, { width: Math.round(box.width * ratio), height: Math.round(box.height * ratio) });
  Object.assign(layer, { width: canvas.width, height: canvas.height });
  redrawEdges();
}
function fit() {
  const { world } = scene, { x, y } = room();
  // The targets' names keep their size on the screen.
  const named = scene.items.filter((item) => item.kind === "logit").map((item) => (x - 30 - 7.6 * (nameOf(item).length + 8)) / item.x);
  const k = Math.min(1.6, Math.max(0.05, Math.min(x / world.width, y / world.height, ...named)));
  const slanted = header.tokens.some((what, position) => !fits(word(what), world.columns[position].width * k));
  if (slanted !== AXIS.slanted) { // the names need another height: lay out again, once
    Object.assign(AXIS, { slanted, bottom: slanted ? 62 : 30 });
    if (slanted) { rebuild(); return fit(); }
  }
  view = { k, x: AXIS.left + 4 + Math.max(0, (x - world.width * k) / 3), y: 8 + Math.max(0, (y - world.height * k) / 2) };
  return paint();
}
