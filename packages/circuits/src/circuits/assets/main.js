// Controls, pointer and keyboard.
let tab = "details", dragged = false;
const TABS = { details, nodes: nodesTab, groups: groupsTab };

function refresh() { rebuild(); fillPanel(); }
function fillPanel() {
  for (const one of document.querySelectorAll("[role=tab]")) {
    one.setAttribute("aria-selected", String(one.id === `tab-${tab}`));
    one.tabIndex = one.id === `tab-${tab}` ? 0 : -1;
  }
  byId("panel").setAttribute("aria-labelledby", `tab-${tab}`);
  byId("panel").replaceChildren(...TABS[tab]());
}
function openTab(name) { tab = name; fillPanel(); }
function pick(item) {
  state.picked = item;
  state.focus = item ?? state.focus;
  if (item && !item.members && item.super?.folded) { item.super.folded = false; }
  if (item && !item.members && ranks(item) && !item.shown) setCount(item.rank + 1);
  tab = "details";
  byId("tip").hidden = true;
  refresh();
  byId("panel").scrollTop = 0;
  if (item) { reveal(item); say(`${sentence(item, state.target)}. ${scene.chosen.length} edges shown.`); }
}
function mark(item) {
  if (!state.marked.delete(item)) state.marked.add(item);
  say(`${state.marked.size} marked; press g to group them`);
  openTab("groups");
  paint();
}
function glance(item) {
  hover(item);
  if (!item) { byId("tip").hidden = true; return; }
  const { x, y } = toScreen(item), box = canvas.getBoundingClientRect();
  showTip(item, x + box.left, y + box.top);
}
function reveal(item) { // pan just as far as needed
  const { x, y } = toScreen(item), edge = 40;
  view = { ...view, x: view.x + Math.max(AXIS.left + edge - x, 0) + Math.min(size.width - edge - x, 0),
    y: view.y + Math.max(edge - y, 0) + Math.min(size.height - AXIS.bottom - edge - y, 0) };
  paint();
}

function showTip(item, x, y) {
  const tip = byId("tip"), rows = [html("b", { textContent: nameOf(item) })];
  if (!item.members && ranks(item)) rows.push(html("div", { textContent: `activation ${number(item.activation)}` }));
  rows.push(html("div", { textContent: item.kind === "logit" ? `value ${number(item.activation)}` : `effect ${signed(effect(item, state.target))} on ${word(header.targets[state.target])}` }));
  if (item.note) rows.push(html("div", { className: "words", textContent: item.note }));
  tip.replaceChildren(...rows);
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
}
function itemAt(event) {
  const box = canvas.getBoundingClientRect(), x = (event.clientX - box.left - view.x) / view.k, y = (event.clientY - box.top - view.y) / view.k;
  let found = null, nearest = 9 / Math.min(1, view.k);
  for (const item of scene.items) {
    const distance = item.members ? Math.max(0, Math.abs(x - item.x) - item.width / 2, Math.abs(y - item.y) - 10) : Math.hypot(x - item.x, y - item.y);
    if (distance < nearest) { nearest = distance; found = item; }
  }
  return found;
}

function zoom(factor, x = size.width / 2, y = size.height / 2) {
  const k = Math.min(8, Math.max(0.05, view.k * factor)), ratio = k / view.k;
  view = { k, x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio };
  moved = performance.now();
  paint();
}
function pointer() {
  let from = null;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-Math.max(-0.4, Math.min(0.4, event.deltaY * 0.0015))), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    from = { x: event.clientX, y: event.clientY, view };
    dragged = false;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (from) {
      const dx = event.clientX - from.x, dy = event.clientY - from.y;
      if (Math.hypot(dx, dy) > 4) { dragged = true; canvas.classList.add("moving"); byId("tip").hidden = true; }
      if (dragged) { view = { ...view, x: from.view.x + dx, y: from.view.y + dy }; moved = performance.now(); paint(); }
      return;
    }
    const item = itemAt(event);
    if (item) showTip(item, event.clientX, event.clientY);
    else byId("tip").hidden = true;
    hover(item);
  });
  canvas.addEventListener("pointerup", (event) => {
    const item = dragged ? null : itemAt(event), click = from && !dragged;
    from = null;
    canvas.classList.remove("moving");
    if (!click) return;
    if (event.shiftKey && item) mark(item);
    else pick(item && item !== state.picked ? item : null);
  });
  canvas.addEventListener("dblclick", (event) => { const item = itemAt(event); if (item?.members) fold(item, false); });
  canvas.addEventListener("pointerleave", () => { byId("tip").hidden = true; hover(null); });
}
// Of the drawing, only the tokens change with what is under the pointer.
function hover(item) {
  if (item === state.over) return;
  state.over = item;
  canvas.classList.toggle("over", Boolean(item));
  requestAnimationFrame(tokenNames);
}

// The arrows go to the nearest thing in their direction; what lies aside counts double.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
function step([dx, dy]) {
  const from = state.focus ?? ranked.find((node) => scene.items.includes(node)) ?? scene.items[0];
  let next = state.focus ? null : from, nearest = Infinity;
  for (const item of state.focus ? scene.items : []) {
    const along = (item.x - from.x) * dx + (item.y - from.y) * dy, aside = Math.abs((item.x - from.x) * dy) + Math.abs((item.y - from.y) * dx);
    if (item !== from && along > 1 && along + 2 * aside < nearest) { nearest = along + 2 * aside; next = item; }
  }
  if (!next) return;
  state.focus = next;
  reveal(next);
  glance(next);
  say(sentence(next, state.target));
}
const typing = () => /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName) && document.activeElement.type !== "range";
const KEYS = {
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit,
  g: () => group(state.marked.size ? [...state.marked] : state.focus ? [state.focus] : []),
  m: () => state.focus && mark(state.focus),
  f: () => { const one = state.focus?.members ? state.focus : state.focus?.super; if (one) fold(one, !one.folded); },
};
function keyboard() {
  canvas.addEventListener("keydown", (event) => {
    if (ARROWS[event.key]) step(ARROWS[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && state.focus) pick(state.focus === state.picked ? null : state.focus);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("focus", paint);
  canvas.addEventListener("blur", () => { byId("tip").hidden = true; paint(); });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") return escape();
    if (typing() || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    if (event.key === "/") { event.preventDefault(); return byId("find").focus(); }
    if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
    return undefined;
  });
  byId("tabs").addEventListener("keydown", (event) => {
    const names = Object.keys(TABS), turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!turn) return;
    openTab(names[(names.indexOf(tab) + turn + names.length) % names.length]);
    byId(`tab-${tab}`).focus();
  });
}
function escape() {
  if (byId("find").value) { byId("find").value = ""; search(); } else if (state.marked.size) { state.marked.clear(); refresh(); } else pick(null);
  canvas.focus();
}

// All words must occur in what is known of a node: its name, token, layer, kind and description.
function search() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const known = (item) => (item.members ? [...item.members].map(about).concat(item.label).join(" ") : about(item)).toLowerCase();
  state.matches = words.length ? new Set(scene.items.filter((item) => words.every((one) => known(item).includes(one)))) : null;
  if (words.length) say(`${state.matches.size} found`);
  tab = words.length ? "nodes" : "details";
  fillPanel();
  paint();
}
const about = (node) => `${node.label} ${token(node)} layer ${node.layer} L${node.layer} ${node.kind} ${node.note}`;

function setCount(count) { state.count = count; byId("count").value = count; }
function keptMass(items, links) {
  const shown = ranked.slice(0, state.count), least = shown.at(-1), nodeShare = (sum(shown, (node) => node.strength) / (nodeMass || 1)) * header.node_mass_kept;
  const drawn = links.slice(0, state.edges), edgeShare = (sum(drawn, (link) => link.share) / (edgeMass || 1)) * header.edge_mass_kept;
  byId("count-out").textContent = `${shown.length}${least ? `, effect \u2265 ${percent(least.strength / sum(header.target_values, Math.abs))}` : ""}`;
  byId("edges-out").textContent = `${drawn.length} of ${links.length}`;
  byId("node-mass").value = nodeShare;
  byId("edge-mass").value = edgeShare;
  byId("kept").textContent = `nodes ${percent(nodeShare)}, edges ${percent(edgeShare)}`;
}
function controls() {
  header.targets.forEach((name, k) => byId("target").append(html("option", { value: k, textContent: word(name) })));
  byId("target").addEventListener("input", (event) => { state.target = Number(event.target.value); refresh(); });
  Object.assign(byId("count"), { max: ranked.length, value: state.count });
  byId("count").addEventListener("input", (event) => { state.count = Number(event.target.value); refresh(); });
  Object.assign(byId("edges"), { max: edges.length, value: state.edges });
  byId("edges").addEventListener("input", (event) => { state.edges = Number(event.target.value); refresh(); });
  byId("find").addEventListener("input", search);
  byId("find").addEventListener("keydown", (event) => {
    const found = state.matches && [...state.matches].sort((a, b) => strengthOf(b) - strengthOf(a));
    if (event.key !== "Enter" || !found?.length) return;
    pick(found[(found.indexOf(state.picked) + 1) % found.length]);
  });
  byId("fit").addEventListener("click", fit);
  for (const name of Object.keys(TABS)) byId(`tab-${name}`).addEventListener("click", () => openTab(name));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redrawEdges(); paint(); });
  new ResizeObserver(() => { resize(); rebuild(); fit(); }).observe(byId("stage"));
}

const LONGEST_TITLE = 200;  // of a longer prompt the heading shows both ends, and all of it under the pointer
const middleLeftOut = (text) => (text.length <= LONGEST_TITLE ? text : `${text.slice(0, 70)} ... ${text.slice(-120)}`);

byId("title").textContent = middleLeftOut(document.title);
byId("title").title = document.title;
byId("answer").textContent = header.targets.map(word).join(", ");
Object.assign(state, { count: ranked.length, edges: Math.min(edges.length, 250) });
readSupernodes(data.supernodes, true);
readColours();
controls();
pointer();
keyboard();
resize();
refresh();
fit();
