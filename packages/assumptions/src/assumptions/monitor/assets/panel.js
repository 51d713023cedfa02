// The nine assumptions: a row each with its slider, its chart over the turns and its latest scores; and all as a table.

import { chart } from "./chart.js";
import { byId, h, number, signed, spoken } from "./dom.js";

export class Panel {
  constructor(subject, onchange) {
    this.subject = subject;
    this.onchange = onchange;
    this.rows = new Map(subject.dimensions.map((dimension) => [dimension.name, this.row(dimension)]));
    byId("dimensions").replaceChildren(...[...this.rows.values()].map((row) => row.element));
    byId("reset").addEventListener("click", () => this.set([]));
  }

  row(dimension) {
    const { name } = dimension;
    const slider = h("input", { id: `slider-${name}`, type: "range" });
    const hold = h("button", {
      type: "button", class: "quiet hold", "aria-pressed": "false", "aria-label": `Hold ${spoken(name)} at a score`,
      title: "hold the score where the slider is, instead of pushing it",
    }, "hold");
    const output = h("output", { for: slider.id });
    const picture = h("div", { class: "chart" });
    const values = h("p", { class: "values" });
    const effect = dimension.sign > 0 ? "raises" : "lowers";
    const sign = h("abbr", { title: `expected: more of it ${effect} sycophancy` }, dimension.sign > 0 ? "S+" : "S\u2212");
    const about = `${dimension.meaning}; read at block ${dimension.block}, R2 ${number(dimension.r2)} on validation`;
    const heading = h("h3", { title: about }, spoken(name), " ", sign);
    const row = { name, slider, hold, output, picture, values, held: false, latest: 0.5, element: null };
    row.element = h("section", { class: "dimension", "data-name": name },
      heading, picture, h("div", { class: "push" }, slider, output, hold), values);
    slider.addEventListener("input", () => this.changed(row));
    slider.addEventListener("dblclick", () => { this.neutral(row); this.announce(); });
    hold.addEventListener("click", () => {
      if (row.held) this.neutral(row);
      else this.mode(row, true, Math.round(row.latest * 20) / 20);
      this.announce();
    });
    this.neutral(row);
    return row;
  }

  // The settings that are not neutral, as the server takes them.
  get settings() {
    return [...this.rows.values()].filter((row) => row.held || Number(row.slider.value) !== 0)
      .map((row) => ({ dimension: row.name, mode: row.held ? "hold" : "push", value: Number(row.slider.value) }));
  }

  set(settings) {
    for (const [name, row] of this.rows) {
      const one = settings.find((setting) => setting.dimension === name);
      this.mode(row, one?.mode === "hold", one?.value ?? 0);
    }
    this.announce();
  }

  neutral(row) {
    this.mode(row, false, 0);
  }

  // Give a row's slider the range of its mode, and a value.
  mode(row, held, value) {
    const [low, high] = this.subject.ranges[held ? "hold" : "push"];
    row.held = held;
    row.hold.setAttribute("aria-pressed", String(held));
    Object.assign(row.slider, { min: low, max: high, step: held ? 0.05 : 0.5, value });
    const does = held ? `Score at which ${spoken(row.name)} is held` : `Push ${spoken(row.name)}, in standard deviations`;
    row.slider.setAttribute("aria-label", does);
    this.label(row);
  }

  changed(row) {
    this.label(row);
    this.announce();
  }

  announce() {
    byId("reset").disabled = this.settings.length === 0;
    this.onchange();
  }

  label(row) {
    const value = Number(row.slider.value);
    row.output.textContent = row.held ? `at ${number(value)}` : value === 0 ? "as it is" : `${signed(value)} SD`;
    row.slider.setAttribute("aria-valuetext", row.output.textContent);
    row.element?.classList.toggle("active", row.held || value !== 0);
  }

  // Draw the scores of the turns, and of the message that is being read or written.
  draw(turns, draft) {
    for (const [name, row] of this.rows) {
      const series = {
        plain: turns.map((turn) => turn.scores.plain?.[name] ?? null),
        steered: turns.map((turn) => turn.scores.steered?.[name] ?? null),
        stated: turns.map((turn) => (turn.stated.steered ?? turn.stated.plain)?.scores[name] ?? null),
      };
      row.picture.replaceChildren(chart(name, series, draft));
      const latest = draft ?? turns.at(-1)?.scores ?? {};
      row.latest = latest.plain?.[name] ?? 0.5;
      const parts = ["plain", "steered"].filter((kind) => latest[kind]?.[name] !== undefined)
        .map((kind) => h("span", { class: kind }, number(latest[kind][name])));
      row.values.replaceChildren(...parts);
      row.values.classList.toggle("draft", Boolean(draft));
    }
    byId("table").replaceChildren(table([...this.rows.keys()], turns));
  }
}

function table(names, turns) {
  const columns = turns.flatMap((turn, i) => [
    ...Object.entries(turn.scores).map(([arm, scores]) => [`${i + 1}, read ${arm}`, scores]),
    ...Object.entries(turn.stated).map(([arm, stated]) => [`${i + 1}, stated ${arm}`, stated.scores]),
  ]);
  const head = h("tr", {}, h("th", { scope: "col" }, "Turn"),
    ...columns.map(([title]) => h("th", { scope: "col" }, title)));
  const body = names.map((name) => h("tr", {}, h("th", { scope: "row" }, spoken(name)),
    ...columns.map(([, scores]) => h("td", {}, scores[name] === undefined ? "" : number(scores[name])))));
  return h("table", {}, h("thead", {}, head), h("tbody", {}, ...body));
}
