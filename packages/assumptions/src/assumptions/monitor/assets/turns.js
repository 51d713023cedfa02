// The conversation: one item a turn, with both replies side by side where the turn was steered.

import { byId, h, number, signed, spoken } from "./dom.js";

const ENDED = { length: "cut at the token limit", stopped: "stopped" };
const READ = {
  clean: "answered in the form asked for", repaired: "read after repairs", salvaged: "read in part",
  failed: "no scores could be read", template_echo: "repeated the form instead of filling it in",
};

export function settingsText(settings) {
  return settings.map((one) => `${spoken(one.dimension)} ${one.mode === "hold" ? `at ${number(one.value)}` : `${signed(one.value)} SD`}`).join(", ");
}

// `actions`: { ask(number), keep(number, arm) }.
export function turnItem(turn, number, last, actions) {
  const arms = Object.keys(turn.replies);
  const replies = arms.map((arm) => {
    const kept = arm === turn.kept && arms.length > 1;
    const keep = last && arms.length > 1 && !kept
      ? h("button", { type: "button", class: "quiet", onclick: () => actions.keep(number, arm) }, "Go on with this one")
      : null;
    const text = h("p", { class: "text" }, turn.replies[arm].text || "(nothing)");
    return reply(arm, turn.settings, text, [
      kept ? h("span", { class: "note" }, "the conversation goes on with this one") : null,
      ENDED[turn.replies[arm].finish_reason] ? h("span", { class: "note" }, ENDED[turn.replies[arm].finish_reason]) : null,
      keep,
    ], kept);
  });
  const stated = Object.entries(turn.stated).map(([arm, one]) =>
    h("span", { class: "note" }, `Asked (${one.instrument}, ${arm}): ${READ[one.status]}.`));
  const label = `Ask the model for its scores of turn ${number + 1}`;
  const ask = h("button", { type: "button", class: "quiet ask", "aria-label": label, onclick: () => actions.ask(number) },
    stated.length ? "Ask again" : "Ask the model for its scores");
  return h("li", {}, said(turn.text), h("div", { class: `replies arms-${arms.length}` }, ...replies),
    h("p", { class: "after" }, ask, ...stated));
}

// A turn that is being answered: its item, and the element that each arm's text grows in.
export function growingItem(text, settings, compare) {
  const arms = settings.length ? ["steered", ...(compare ? ["plain"] : [])] : ["plain"];
  const texts = Object.fromEntries(arms.map((arm) => [arm, h("p", { class: "text growing" })]));
  const replies = arms.map((arm) => reply(arm, settings, texts[arm], [], false));
  const item = h("li", { "aria-busy": "true" }, said(text), h("div", { class: `replies arms-${arms.length}` }, ...replies));
  return { item, texts };
}

function said(text) {
  return h("div", { class: "said" }, h("span", { class: "who" }, "You"), h("p", { class: "text" }, text));
}

function reply(arm, settings, text, notes, kept) {
  const title = arm === "steered" ? `Model, steered: ${settingsText(settings)}` : "Model";
  return h("div", { class: `reply ${arm}${kept ? " kept" : ""}` }, h("span", { class: "who" }, title), text,
    h("p", { class: "notes" }, ...notes));
}

export function emptyItem(subject) {
  return h("li", { class: "empty" }, h("p", {},
    "Write something. While you write, each chart of the panel shows what the model's activations say it assumes you ",
    "want. Move a slider to change that, and see the reply change beside the unsteered one."),
  h("p", { class: "note" }, `Probes of ${subject.labeller} on ${subject.model}; scores are of this message, not of you.`));
}

export const askButton = (number) => document.querySelector(`#turns > li:nth-child(${number + 1}) .ask`);

// Show the items; who has scrolled up to read stays there, unless `toEnd`.
export function showTurns(items, toEnd) {
  const list = byId("turns");
  if (toEnd) list.scrollTop = list.scrollHeight;
  follow(() => {
    const top = list.scrollTop;
    list.replaceChildren(...items);
    list.scrollTop = top;
  });
}

// Change what the list shows; where its end was in sight, it stays in sight.
export function follow(change) {
  const list = byId("turns");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  change();
  if (atEnd) list.scrollTop = list.scrollHeight;
}
