// Edges are drawn on a layer of their own, the strongest first and the others beneath them, some each frame. While the
// view moves, the layer is moved with it as it is; it is drawn anew when the view has come to rest. So a frame costs the
// same for any number of edges.
const layer = document.createElement("canvas"), brush = layer.getContext("2d");
const LEVELS = 6, PART = 250, QUICK = 18, SLOW = 34, FEW = 60, ATONCE = 24, PAUSE = 120;
let drawn = { view: null, strokes: [], next: 0, budget: 4 }, lastFrame = 0, moved = 0;

function redrawEdges() { drawn = { ...drawn, view: null, strokes: strokesOf(scene.chosen), next: 0 }; }

// Edges of one sign and one width are one path, at most PART in each.
function strokesOf(links) {
  const most = links[0] ? links.reduce((top, link) => Math.max(top, link.share), 1e-30) : 1, open = new Map(), strokes = [];
  for (const link of links) {
    const level = Math.ceil(LEVELS * Math.sqrt(link.share / most)) / LEVELS, minus = toneOf(link), key = `${level}${minus}`;
    if (!open.has(key)) { open.set(key, { level, minus, path: new Path2D(), count: 0 }); strokes.push(open.get(key)); }
    const { source: a, target: b } = link, middle = (a.y + b.y) / 2, stroke = open.get(key);
    stroke.path.moveTo(a.x, a.y);
    stroke.path.bezierCurveTo(a.x, middle, b.x, middle, b.x, b.y);
    if (++stroke.count >= PART) open.delete(key);
  }
  return strokes.sort((a, b) => b.level - a.level);
}

const sameView = (a, b) => a && a.x === b.x && a.y === b.y && a.k === b.k;
function edgesUnderView() {
  const now = performance.now(), took = now - lastFrame;
  lastFrame = now;
  if (!sameView(drawn.view, view)) {
    const moving = now - moved < PAUSE && drawn.view && scene.chosen.length > FEW;
    if (!moving) startLayer();
    else setTimeout(paint, PAUSE);
  }
  if (drawn.next < drawn.strokes.length && sameView(drawn.view, view)) {
    if (took < QUICK) drawn.budget = Math.min(16, drawn.budget + 1);
    else if (took > SLOW) drawn.budget = Math.max(1, drawn.budget >> 1);
    const part = drawn.strokes.length <= ATONCE ? ATONCE : drawn.budget;
    for (let i = 0; i < part && drawn.next < drawn.strokes.length; i++) drawStroke(drawn.strokes[drawn.next++]);
    if (drawn.next < drawn.strokes.length) paint();
  }
  const ratio = view.k / drawn.view.k;
  pen.drawImage(layer, view.x - drawn.view.x * ratio, view.y - drawn.view.y * ratio, size.width * ratio, size.height * ratio);
}
function startLayer() {
  const ratio = devicePixelRatio || 1;
  brush.setTransform(1, 0, 0, 1, 0, 0);
  brush.globalCompositeOperation = "source-over";
  brush.clearRect(0, 0, layer.width, layer.height);
  brush.setTransform(ratio * view.k, 0, 0, ratio * view.k, ratio * view.x, ratio * view.y);
  brush.globalCompositeOperation = "destination-over"; // what comes later lies beneath
  drawn = { ...drawn, view, next: 0 };
}
function drawStroke({ level, minus, path }) {
  brush.strokeStyle = minus ? ink.minus : ink.plus;
  brush.lineWidth = (0.5 + 2.6 * level * level) / Math.sqrt(Math.max(view.k, 0.25));
  brush.globalAlpha = state.picked ? 0.3 + 0.6 * level : 0.1 + 0.55 * level;
  brush.setLineDash(minus ? [5, 3] : []);
  brush.stroke(path);
}
