// The page: one session at a time, one message at a time; what is shown is what the server has kept.

import { events, get, post, remove } from "./api.js";
import { byId, h } from "./dom.js";
import { Panel } from "./panel.js";
import { askButton, emptyItem, follow, growingItem, showTurns, turnItem } from "./turns.js";

const THEMES = [["", "as the system"], ["light", "light"], ["dark", "dark"]];
const PAUSE = 300; // ms without a key before a draft is read
const state = { subject: null, session: null, panel: null, draft: null, busy: false, reading: 0, suggested: 0, ticket: "", stopped: null };

const path = (rest = "") => `/sessions/${state.session.id}${rest}`;
const status = (text) => { byId("status").textContent = text; };

function complain(error) {
  byId("alert").textContent = error ? error.message : "";
  byId("alert").hidden = !error;
  if (error) status("");
}

// Do something that may fail; what is wrong is said in the page.
async function attempt(work) {
  complain(null);
  try {
    return await work();
  } catch (error) {
    complain(error);
    return null;
  }
}

function show(growing = null, toEnd = Boolean(growing)) {
  const { session, subject } = state;
  byId("title").textContent = session.title;
  byId("remember").checked = session.remember;
  byId("markdown").href = `/api${path("/transcript.md")}`;
  byId("json").href = `/api${path("/transcript.json")}`;
  const last = session.turns.length - 1;
  const items = session.turns.map((turn, i) => turnItem(turn, i, i === last && !growing, { ask, keep }));
  if (growing) items.push(growing);
  showTurns(items.length ? items : [emptyItem(subject)], toEnd);
  state.panel.draw(session.turns, state.draft);
}

async function listSessions() {
  const items = (await get("/sessions")).map((one) => {
    const current = one.id === state.session?.id;
    const open = h("button", {
      type: "button", class: "quiet", title: one.title, "aria-current": current ? "true" : false, onclick: () => attempt(() => open_(one.id)),
    }, one.title, h("small", {}, one.usable ? `${one.turns} turns` : "another model"));
    const drop = h("button", {
      type: "button", class: "quiet drop", "aria-label": `Delete ${one.title}`, onclick: () => attempt(() => drop_(one.id)),
    }, "\u00d7");
    return h("li", {}, open, drop);
  });
  byId("sessions").replaceChildren(...items);
}

async function open_(id) {
  if (state.busy) throw new Error("A reply is being written: wait for it, or stop it.");
  state.session = id ? await get(`/sessions/${id}`) : await post("/sessions");
  state.draft = null;
  localStorage.setItem("session", state.session.id);
  state.panel.set(state.session.turns.at(-1)?.settings ?? []);
  show(null, true);
  await listSessions();
  readDraft();
}

async function drop_(id) {
  if (!confirm("Delete this conversation for good?")) return;
  await remove(`/sessions/${id}`);
  if (id === state.session.id) await open_(null);
  else await listSessions();
}

function busy(yes) {
  state.busy = yes;
  byId("send").hidden = yes;
  byId("stop").hidden = !yes;
  byId("remember").disabled = yes;
}

function sampling() {
  const seed = byId("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(byId("seed").value);
  const value = (id) => Number(byId(id).value);
  return { temperature: value("temperature"), top_p: value("top_p"), max_tokens: value("max_tokens"), seed };
}

async function say() {
  const text = byId("message").value;
  if (state.busy || !text.trim()) return;
  const { settings } = state.panel;
  const compare = byId("compare").checked;
  const { item, texts } = growingItem(text, settings, compare);
  const ticket = state.ticket = Math.random().toString(36).slice(2);
  busy(true);
  status("The model is reading.");
  byId("message").value = "";
  state.draft = null;
  show(item);
  let kept = false;
  await attempt(async () => {
    for await (const { name, content } of events(path("/turns"), { text, settings, compare, draw: sampling(), ticket })) {
      if (name === "queued" && content.ahead) status(`Waiting for ${content.ahead} other request(s).`);
      if (name === "scores") { state.draft = content; state.panel.draw(state.session.turns, content); status("The model is writing."); }
      if (name === "piece") follow(() => { texts[content.arm].textContent += content.text; });
      if (name === "error") throw new Error(content.error);
      if (name === "turn") { state.session = await get(path()); kept = true; status("The reply is complete."); }
    }
  });
  state.draft = null;
  if (!kept && !byId("message").value) byId("message").value = text;
  if (!kept && byId("alert").hidden) {
    if (state.stopped === ticket) status("Stopped before a reply had begun.");
    else complain(new Error("The server ended before the reply did: start `assumptions monitor` again."));
  }
  busy(false);
  show();
  byId("message").focus();
  await attempt_quietly(listSessions);
}

// Work whose failure must not hide an error that is shown already.
async function attempt_quietly(work) {
  if (byId("alert").hidden) await attempt(work);
}

const stop = () => attempt(async () => {
  status("Stopping.");
  state.stopped = state.ticket;
  await post(path("/stop"), { ticket: state.ticket });
});

const ask = (number) => attempt(async () => {
  status("Asking the model.");
  askButton(number).disabled = true;
  try {
    await post(path(`/turns/${number}/ask`));
    state.session = await get(path());
    status("The model has stated its scores.");
  } finally {
    if (!state.busy) show();
    askButton(number)?.focus();
  }
});

const keep = (number, arm) => attempt(async () => {
  state.session = await post(path(`/turns/${number}/keep`), { arm });
  show();
});

// Read what is being written, when the fingers rest; an answer that comes late is dropped.
async function readDraft() {
  const reading = ++state.reading;
  await new Promise((done) => setTimeout(done, PAUSE));
  const text = byId("message").value;
  if (reading !== state.reading || state.busy) return;
  if (!text.trim()) {
    if (state.draft) { state.draft = null; state.panel.draw(state.session.turns, null); }
    return;
  }
  await attempt(async () => {
    const scores = await post(path("/read"), { text, settings: state.panel.settings });
    if (reading !== state.reading || state.busy) return;
    state.draft = scores;
    state.panel.draw(state.session.turns, scores);
  });
}

function suggest() {
  const { suggestions } = state.subject.talk;
  byId("message").value = suggestions[state.suggested++ % suggestions.length];
  byId("message").focus();
  readDraft();
}

function theme(place) {
  const [scheme, name] = THEMES[place];
  document.documentElement.style.colorScheme = scheme || "light dark";
  byId("theme").textContent = `Colours: ${name}`;
  localStorage.setItem("theme", place);
}

async function start() {
  theme(Number(localStorage.getItem("theme") ?? 0));
  state.subject = await get("/subject");
  const { subject } = state;
  byId("about").textContent = `${subject.model}, at most ${subject.context} tokens`;
  for (const id of ["temperature", "top_p", "max_tokens"]) byId(id).value = subject.talk.draw[id];
  byId("suggest").hidden = subject.talk.suggestions.length === 0;
  state.panel = new Panel(subject, readDraft);
  const known = (await get("/sessions")).filter((one) => one.usable).map((one) => one.id);
  const former = localStorage.getItem("session");
  await open_(known.includes(former) ? former : known[0] ?? null);
  byId("message").focus();
}

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); say(); });
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); say(); }
});
byId("message").addEventListener("input", readDraft);
byId("stop").addEventListener("click", stop);
byId("suggest").addEventListener("click", suggest);
// An empty conversation is as good as a new one.
byId("new").addEventListener("click", () => attempt(() => open_(state.session?.turns.length === 0 ? state.session.id : null)));
byId("theme").addEventListener("click", () => theme((Number(localStorage.getItem("theme")) + 1) % THEMES.length));
byId("remember").addEventListener("change", (event) => attempt(async () => {
  state.session = await post(path(), { remember: event.target.checked });
  show();
  readDraft();
}));
await attempt(start);
document.documentElement.dataset.ready = "true";
