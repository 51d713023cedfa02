// One dimension's scores over the turns: lines for what is read, dots for what is stated, a ring for the draft.

import { h, number, spoken } from "./dom.js";

const WIDTH = 150;
const HEIGHT = 46;
const EDGE = 5;

// `series`: { plain, steered, stated }, arrays over turns with null where there is no score; `draft`: scores or null.
export function chart(name, series, draft) {
  const count = series.plain.length + (draft ? 1 : 0);
  const x = (turn) => (count < 2 ? WIDTH - EDGE : EDGE + (turn * (WIDTH - 2 * EDGE)) / (count - 1));
  const y = (score) => HEIGHT - EDGE - score * (HEIGHT - 2 * EDGE);
  const drawn = [0, 0.5, 1].map((level) =>
    h("line", { class: level === 0.5 ? "middle" : "edge", x1: 0, x2: WIDTH, y1: y(level), y2: y(level) }));
  for (const kind of ["plain", "steered", "stated"]) {
    const points = series[kind].map((score, turn) => [turn, score]).filter(([, score]) => score !== null);
    if (kind !== "stated" && points.length > 1) {
      const path = points.map(([turn, score], i) => `${i ? "L" : "M"}${x(turn)} ${y(score)}`).join("");
      drawn.push(h("path", { class: kind, d: path }));
    }
    for (const [turn, score] of points) {
      const title = h("title", {}, `Turn ${turn + 1}, ${kind}: ${number(score)}`);
      drawn.push(h("circle", { class: kind, cx: x(turn), cy: y(score), r: kind === "stated" ? 3.2 : 2.4 }, title));
    }
  }
  for (const kind of ["plain", "steered"]) {
    const score = draft?.[kind]?.[name];
    if (score !== undefined) {
      drawn.push(h("circle", { class: `${kind} draft`, cx: x(count - 1), cy: y(score), r: 3.2 }));
    }
  }
  const label = `${spoken(name)} over ${series.plain.length} turns: ${describe(series)}`;
  return h("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...drawn);
}

function describe(series) {
  const kinds = Object.entries(series).filter(([, scores]) => scores.some((score) => score !== null));
  const text = kinds.map(([kind, scores]) =>
    `${kind} ${scores.map((score) => (score === null ? "none" : number(score))).join(", ")}`);
  return text.join("; ") || "no scores yet";
}
