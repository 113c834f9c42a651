"use strict";
// The page of a review. Every text comes in through textContent; nothing is ever parsed as HTML.
const $ = (id) => document.getElementById(id);
// Characters that turn the reading direction or are not shown at all could make one text look like another.
const plain = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, "\ufffd");
let data = null, at = 0, editing = false, busy = false;

function put(parent, name, text, className) {
  const element = document.createElement(name);
  element.textContent = plain(text);
  element.dir = "auto";
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function show() {
  const record = data.sample[at], made = data.decisions[record.id];
  editing = false;
  $("place").textContent = `Record ${at + 1} of ${data.sample.length}${record.kind ? `, ${record.kind}` : ""}`;
  $("picture").classList.remove("small");
  $("picture").hidden = false;
  $("missing").hidden = true;
  $("picture").src = `image/${at}`;
  $("picture").alt = `picture of record ${at + 1}`;
  $("path").textContent = plain(record.image);
  $("turns").replaceChildren();
  let answer = 0;
  for (const turn of record.turns) {
    const human = turn.speaker === "human";
    const text = !human && made?.decision === "relabel" ? made.answers[answer] : turn.text;
    put($("turns"), human ? "dt" : "dd", text);
    if (!human) answer += 1;
  }
  $("truth").hidden = !record.truth;
  $("truth").textContent = record.truth ? plain(`Known: ${record.truth}`) : "";
  const found = Object.entries(record.why);
  $("why").hidden = found.length === 0;
  $("why").replaceChildren();
  for (const [check, why] of found) put($("why"), "li", `${check}: ${why}`);
  $("decision").textContent = made ? `Decided: ${made.decision}` : "Not decided yet";
  $("decision").className = made ? made.decision : "";
  $("problem").textContent = "";
  $("estimate").textContent = data.estimate;
  const decided = data.sample.filter((r) => data.decisions[r.id]).length;
  $("done").style.width = `${(100 * decided) / data.sample.length}%`;
}

function go(step) {
  at = Math.min(Math.max(at + step, 0), data.sample.length - 1);
  show();
  $("record").focus({ preventScroll: true });
}

function nextOpen() {
  for (let i = 1; i <= data.sample.length; i += 1) {
    const place = (at + i) % data.sample.length;
    if (!data.decisions[data.sample[place].id]) { at = place; break; }
  }
  show();
  $("record").focus({ preventScroll: true });
}

async function post(name, body) {
  const answer = await fetch(name, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function decide(decision, answers = []) {
  if (busy) return;
  busy = true;
  try {
    Object.assign(data, await post("decide", { id: data.sample[at].id, decision, answers }));
    if (decision) nextOpen(); else show();
  } catch (error) {
    $("problem").textContent = plain(error instanceof TypeError ? "The command that serves this page has ended; start it again, nothing decided is lost." : error.message);
  } finally {
    busy = false;
  }
}

function edit() {
  if (editing) return;
  editing = true;
  const areas = [];
  const record = data.sample[at], made = data.decisions[record.id];
  const answers = made?.decision === "relabel" ? made.answers : record.turns.filter((t) => t.speaker !== "human").map((t) => t.text);
  for (const said of $("turns").querySelectorAll("dd")) {
    const area = document.createElement("textarea");
    area.value = answers[areas.length];
    area.dir = "auto";
    area.setAttribute("aria-label", `answer ${areas.length + 1}`);
    said.replaceChildren(area);
    areas.push(area);
  }
  const save = put($("turns"), "button", "Save the new answers (Ctrl+Enter)");
  save.type = "button";
  save.id = "save";
  save.addEventListener("click", saved);
  areas[0].focus();
}

function saved() {
  decide("relabel", [...$("turns").querySelectorAll("textarea")].map((a) => a.value));
}

async function finish() {
  try {
    Object.assign(data, await post("finish", {}));
    document.body.replaceChildren();
    put(document.body, "h1", "Finished");
    put(document.body, "p", data.estimate).id = "estimate";
    put(document.body, "p", "You can close this page.");
  } catch {
    $("problem").textContent = "The command that serves this page has ended already.";
  }
}

const actions = {
  k: () => decide("keep"), d: () => decide("drop"), u: () => decide(""), r: edit, ArrowLeft: () => go(-1), ArrowRight: () => go(1),
};
document.addEventListener("keydown", (event) => {
  if (!data || !$("record")) return;
  if (editing) {
    if (event.key === "Escape") show();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) saved();
    else return;
    event.preventDefault();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) { event.preventDefault(); action(); }
});
$("keep").addEventListener("click", actions.k);
$("relabel").addEventListener("click", actions.r);
$("drop").addEventListener("click", actions.d);
$("undo").addEventListener("click", actions.u);
$("previous").addEventListener("click", actions.ArrowLeft);
$("next").addEventListener("click", actions.ArrowRight);
$("finish").addEventListener("click", finish);
$("picture").addEventListener("load", () => $("picture").classList.toggle("small", $("picture").naturalWidth <= 96));
$("picture").addEventListener("error", () => { $("picture").hidden = true; $("missing").hidden = false; });

fetch("data.json").then((answer) => answer.json()).then((found) => {
  data = found;
  $("corpus").textContent = plain(data.corpus);
  at = Math.max(data.sample.findIndex((r) => !data.decisions[r.id]), 0);
  show();
});
