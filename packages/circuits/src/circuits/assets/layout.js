// Where things stand: layers from bottom to top, tokens from left to right, each cell a small grid of nodes with the
// folded supernodes, as pills, above it. World units are CSS pixels at zoom 1.
const STEP = 17, GAP = 26, LEFT = 8, PILL = 24, LETTER = 7.1, SLANT = 6; // longer names of tokens may be slanted

// The things that are drawn: shown nodes outside of folded supernodes, and the folded supernodes.
function visibleItems() {
  const folded = supernodes.filter((one) => one.folded);
  return [...nodes.filter((node) => node.shown && !node.super?.folded), ...folded];
}
const itemOf = (node) => (node.super?.folded ? node.super : node);

// A supernode stands at its strongest member's token and its members' middle layer.
function home(item) {
  if (!item.members) return { layer: item.layer, position: item.position };
  const members = [...item.members].sort((a, b) => b.strength - a.strength), middle = members.map((node) => node.layer).sort((a, b) => a - b);
  return { layer: middle[middle.length >> 1], position: members[0].position };
}

function layOut(items) {
  const cells = new Map();
  for (const item of items) {
    const { layer, position } = home(item), row = Math.max(layer, -1) + 1, key = `${row},${position}`;
    if (!cells.has(key)) cells.set(key, { row, position, dots: [], pills: [] });
    cells.get(key)[item.members ? "pills" : "dots"].push(item);
  }
  for (const cell of cells.values()) {
    cell.dots.sort((a, b) => b.strength - a.strength);
    for (const pill of cell.pills) pill.width = pill.label.length * LETTER + 34;
  }
  const columns = widths([...cells.values()]);
  const width = columns.at(-1).x + columns.at(-1).width, rows = spread(heights([...cells.values()], columns), width);
  for (const cell of cells.values()) settle(cell, columns[cell.position], rows[cell.row]);
  return { columns, rows, width, height: rows[0].y + rows[0].height };
}

// Long prompts are wide: the layers then move apart, to fill the window that the width is fitted to.
const APART = 110;
function spread(rows, width) {
  const { x, y } = room(), extra = Math.max(0, Math.min(APART, (width * y / x - rows[0].y - rows[0].height) / rows.length));
  return rows.map((row, r) => ({ ...row, y: row.y + (rows.length - 1 - r) * extra, height: row.height + extra, above: extra / 2 }));
}

function widths(cells) {
  let x = LEFT;
  return header.tokens.map((text, position) => {
    const here = cells.filter((cell) => cell.position === position);
    const across = Math.max(2, Math.ceil(Math.sqrt(1.6 * Math.max(1, ...here.filter((cell) => cell.row <= header.n_layers).map((cell) => cell.dots.length)))));
    const pills = here.flatMap((cell) => cell.pills.map((pill) => pill.width));
    const full = here.some((cell) => cell.row > 0), name = Math.min(word(text).length, SLANT) * LETTER;
    const column = { x, across, width: Math.max(full ? across * STEP : 0, name, ...pills) + (full ? GAP : GAP / 2) };
    x += column.width;
    return column;
  });
}

function heights(cells, columns) {
  const rows = [];
  let y = 0;
  for (let row = header.n_layers + 1; row >= 0; row--) {
    const here = cells.filter((cell) => cell.row === row);
    const dots = here.map((cell) => (row > header.n_layers ? 1.4 * cell.dots.length : Math.ceil(cell.dots.length / columns[cell.position].across)));
    const pills = Math.max(0, ...here.map((cell) => cell.pills.length)) * PILL;
    rows[row] = { y, pills, height: Math.max(1, ...dots) * STEP + pills + 0.75 * GAP };
    y += rows[row].height;
  }
  return rows;
}

// The strongest stand in the middle of their column, the others fall away to both sides.
function settle(cell, column, row) {
  const middle = column.x + column.width / 2, top = row.y + row.above + 0.4 * GAP;
  cell.pills.forEach((pill, i) => { pill.x = middle; pill.y = top + (i + 0.5) * PILL; });
  const target = cell.row > header.n_layers, across = target ? 1 : cell.row === 0 ? cell.dots.length : column.across;
  cell.dots.forEach((node, i) => {
    const step = i % across, aside = step % 2 ? (step + 1) / 2 : -step / 2;
    node.x = middle + aside * STEP;
    node.y = top + row.pills + STEP / 2 + Math.floor(i / across) * STEP * (target ? 1.4 : 1);
  });
}

// Edges between what is drawn. Those of folded supernodes are summed, as flow to the chosen target: weights into
// different neurons have different units.
function visibleLinks(k) {
  const links = [], bundles = new Map();
  for (const edge of edges) {
    if (!edge.source.shown || !edge.target.shown) continue;
    const source = itemOf(edge.source), target = itemOf(edge.target);
    if (source === target) continue;
    if (!source.members && !target.members) { links.push({ source, target, weight: edge.weight, flow: flow(edge, k), share: edge.share, edge }); continue; }
    const key = `${keyOf(source)}>${keyOf(target)}`;
    if (!bundles.has(key)) { const made = { source, target, weight: null, flow: 0, share: 0, count: 0 }; bundles.set(key, made); links.push(made); }
    const bundle = bundles.get(key);
    bundle.flow += flow(edge, k); bundle.share += edge.share; bundle.count += 1;
  }
  return links.sort((a, b) => b.share - a.share);
}
const keyOf = (item) => (item.members ? `s${supernodes.indexOf(item)}` : item.id);
const toneOf = (link) => (link.weight ?? link.flow) < 0;
