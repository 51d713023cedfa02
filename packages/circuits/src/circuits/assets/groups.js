// Supernodes made, renamed, folded, changed, saved and read again.
function memberActions(node) {
  if (node.kind !== "neuron") return [];
  if (node.super) return [html("p", { className: "words" }, "In ", button(node.super.label, () => { fold(node.super, true); pick(node.super); }, { className: "link" }))];
  const add = html("select", { aria: { label: "add to a supernode" } }, html("option", { value: "", textContent: "add to \u2026" }),
    ...supernodes.map((one, i) => html("option", { value: i, textContent: one.label })), html("option", { value: "new", textContent: "a new supernode" }));
  add.addEventListener("change", () => {
    if (add.value === "new") return group([node]);
    const one = supernodes[Number(add.value)];
    addTo(one, node);
    refresh();
    return say(`${nameOf(node)} added to ${one.label}`);
  });
  return [html("div", { className: "row" }, add)];
}

function group(chosen) {
  const members = chosen.flatMap((item) => (item.members ? [...item.members] : [item])).filter((node) => node.kind === "neuron");
  if (!members.length) return say("Only neurons can be grouped.");
  let number = groups.length + 1;
  while (groups.some((one) => one.label === `group ${number}`)) number += 1;
  const made = addSupernode(`group ${number}`, members);
  state.marked.clear();
  refresh();
  pick(made);
  byId("label")?.select();
  return say(`${made.label} of ${members.length} nodes made; type its name`);
}
function fold(one, folded) {
  one.folded = folded;
  refresh();
  say(`${one.label} ${folded ? "folded" : "unfolded"}`);
}
function foldAll(folded) {
  for (const one of supernodes) one.folded = folded;
  refresh();
  say(`${supernodes.length} supernodes ${folded ? "folded" : "unfolded"}`);
}

function supernodeEditor(one) {
  const name = html("input", { type: "text", id: "label", value: one.label, maxLength: 60, aria: { label: "name of the supernode" } });
  name.addEventListener("change", () => { one.label = name.value.trim() || one.label; refresh(); });
  const members = [...one.members].sort((a, b) => b.strength - a.strength).map((node) => html("li", { className: "member" },
    html("span", { className: "name", textContent: nameOf(node) }), html("span", { textContent: signed(effect(node, state.target)) }),
    button("\u00d7", () => { takeOut(one, node); refresh(); },
      { title: "take out", aria: { label: `take ${nameOf(node)} out` } })));
  return [
    html("div", { className: "row" }, name, button("unfold", () => { fold(one, false); }), button("dissolve", () => { removeSupernode(one); refresh(); })),
    html("h3", { textContent: "members" }), html("ul", { className: "list" }, ...members),
  ];
}
function groupsTab() {
  const rows = supernodes.map((one) => html("li", { className: "member" },
    html("button", { type: "button", className: "link name", textContent: `${one.label} (${one.members.size})`, on: { click: () => { fold(one, true); pick(one); } } }),
    html("span", { textContent: signed(effect(one, state.target)) }),
    button(one.folded ? "unfold" : "fold", () => fold(one, !one.folded), { aria: { label: `${one.folded ? "unfold" : "fold"} ${one.label}` } })));
  const absent = groups.length - supernodes.length;
  const file = html("input", { type: "file", accept: "application/json", hidden: true });
  file.addEventListener("change", async () => openFile(file.files[0]));
  return [
    html("h2", { textContent: "Supernodes" }),
    ...(absent ? [html("p", { className: "words", textContent: `${absent} more of the file name no neuron of this graph; they are kept.` })] : []),
    ...(rows.length ? [html("ul", { className: "list" }, ...rows)] : [html("p", { className: "words", textContent: "None yet: shift-click nodes, then press g." })]),
    html("div", { className: "row" },
      button(`group ${state.marked.size || ""} marked`, () => group([...state.marked]), { disabled: !state.marked.size, id: "group" }),
      button("fold all", () => foldAll(true)), button("unfold all", () => foldAll(false))),
    html("div", { className: "row" }, ...(data.live ? [button("save", save, { id: "save" })] : []),
      button("download", download, { id: "download" }), button("open \u2026", () => file.click()), file),
  ];
}
async function openFile(file) {
  try {
    readSupernodes(JSON.parse(await file.text()));
    say(`${supernodes.length} supernodes read`);
  } catch (error) {
    say(`This file cannot be read: ${error.message}`);
  }
  refresh();
}
function download() {
  const address = URL.createObjectURL(new Blob([JSON.stringify(writtenSupernodes(), null, 1)], { type: "application/json" }));
  html("a", { href: address, download: "supernodes.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
  say("supernodes.json downloaded; put it beside the graph's graph.json");
}
async function save() {
  const answer = await post("supernodes", writtenSupernodes());
  say(answer.error ?? `${answer.saved} supernodes saved`);
}
