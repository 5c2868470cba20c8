"use strict";
// `pairs[0]` is on the screen; the others are loaded meanwhile, so that the next one appears at once
// after an answer. Feedback is sent in order, one request at a time, and reported as saved only
// after the server has confirmed it.

const FPS = 25;
const $ = (id) => document.getElementById(id);
const stage = $("stage");
let pairs = [];              // {id, clips, root, videos, since}
let chosen = 0;              // side of the clip that keys act on
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let unsaved = 0;             // requests that aren't confirmed yet
let renewing = 0;
let run = { state: "", text: "", command: "" };
const answeredHere = new Set();  // queries answered here; an older reply may still list them
const undoable = JSON.parse(sessionStorage.getItem("undoable") || "[]");
const WORDS = { left: "Left is better", right: "Right is better", same: "The same", unsure: "Can’t tell", skip: "Skipped" };

const DRAWING = "Loading these clips…";

function showStatus(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

class Refused extends Error {
  constructor(status, reason) { super(reason); this.status = status; }
}

async function post(path, body) {
  const reply = await fetch("/api/" + path, {
    method: "POST", keepalive: true,   // arrives even if the tab is closed just now
    headers: { "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const content = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, content.reason || `The server replied with status ${reply.status}.`);
  return content;
}

// Repeat a request until the server confirms or refuses it: it may be restarting.
async function postUntilConfirmed(path, body) {
  for (let pause = 200, tried = false; ; pause = Math.min(2 * pause, 5000), tried = true) {
    try {
      return await post(path, body);
    } catch (error) {
      if (error instanceof Refused && error.status < 500) {
        // An earlier attempt may have arrived although its reply was lost.
        if (tried && error.status === 409) return null;
        throw error;
      }
      showStatus("Not saved yet: the server doesn’t reply. Trying again…", true);
      await new Promise((done) => setTimeout(done, pause));
    }
  }
}

let queue = Promise.resolve();
function enqueue(job) {
  unsaved += 1;
  queue = queue.then(job).catch((error) => {
    showStatus(error.message, true);
    return post("next").then(update).catch(() => {});
  }).finally(() => { unsaved -= 1; });
  return queue;
}

function remember({ kind, id, receipt }, query) {
  undoable.push({ kind, id, receipt, query });
  undoable.splice(0, undoable.length - 50);
  storeUndoable();
}

function storeUndoable() {
  sessionStorage.setItem("undoable", JSON.stringify(undoable));
  $("undo").disabled = undoable.length === 0 && unsaved === 0;
}

// ---- the state of the page, as the server reports it

function update(state) {
  if (!state) return post("next").then(update);
  run = state.run;
  if ($("status").textContent === "Loading…") showStatus("");
  const ended = ["over", "gone", "unshown"].includes(run.state);
  const ask = state.name === "" && !ended;
  $("welcome").hidden = !ask;
  $("work").hidden = ask;
  $("answers").hidden = $("others").hidden = ended;
  if (ask) { $("name").focus(); return; }
  if (!state.queries) {   // there is nothing to compare from here on
    pairs.forEach(discard);
    pairs = [];
    return showRun();
  }
  const wanted = state.queries.filter((query) => !answeredHere.has(query.id));
  // The pair on the screen stays there; after an undo, the reopened pair comes first.
  const front = state.query || (pairs[0] && pairs[0].id);
  wanted.sort((a, b) => (b.id === front) - (a.id === front));
  const have = new Map(pairs.map((pair) => [pair.id, pair]));
  const before = pairs[0];
  pairs = wanted.map((query) => have.get(query.id) || load(query));
  for (const [id, pair] of have) if (!wanted.some((query) => query.id === id)) discard(pair);
  if (pairs[0] !== before) show();
  showRun();
  const { same, repeated } = state.agreement;
  $("progress-text").textContent = `${state.answered} of ${state.budget} answered` +
    (state.declined ? `, ${state.declined} skipped or unsure` : "") +
    (repeated ? ` · same answer to ${same} of ${repeated} repeated questions` : "");
  $("progress").max = Math.max(1, state.budget);
  $("progress").value = state.answered;
  storeUndoable();
  clearTimeout(renewing);
  renewing = setTimeout(renew, pairs.length ? 1000 * state.renew_seconds : 2000);
}

// What the run is doing: alone where there is no pair, above one if the run was stopped.
function showRun() {
  const [text, command] = $("run").children;
  $("run").hidden = pairs.length > 0 && run.state !== "paused";
  $("run").classList.toggle("alone", pairs.length === 0);
  text.textContent = run.text;
  command.textContent = run.command;
  command.hidden = !run.command;
}

function renew() {
  if (unsaved) { renewing = setTimeout(renew, 2000); return; }
  post("next").then(update).catch((error) => {
    showStatus(error instanceof Refused ? error.message : "The server doesn’t reply. Trying again…", true);
    renewing = setTimeout(renew, 3000);
  });
}

function load(query) {
  const root = $("pair").content.firstElementChild.cloneNode(true);
  root.append(root.firstElementChild.cloneNode(true));
  root.inert = true;
  const pair = { id: query.id, clips: query.clips, root, since: 0, seen: false };
  pair.figures = [...root.querySelectorAll(".clip")];
  pair.videos = pair.figures.map((figure, side) => prepare(pair, figure, side));
  stage.append(root);
  return pair;
}

function prepare(pair, figure, side) {
  const name = side ? "Right clip" : "Left clip";
  const clip = pair.clips[side];
  const video = clip.text === undefined ? figure.querySelector("video") : written(figure, clip.text);
  figure.setAttribute("aria-label", name);
  video.setAttribute("aria-label", clip.text === undefined ? `${name}, ${clip.frames} frames` : name);
  if (clip.text === undefined) video.src = `/video/${clip.id}`;
  video.addEventListener("error", () => { if (video.hasAttribute("src")) explainFailure(figure, clip); });
  video.addEventListener("ended", () => loopInStep(pair));
  figure.addEventListener("focusin", () => choose(side));
  figure.addEventListener("pointerdown", () => choose(side));
  for (const button of figure.querySelectorAll(".hold")) {
    const good = button.dataset.good === "1";
    button.setAttribute("aria-label", `Mark as ${good ? "good" : "bad"} while held, ${name.toLowerCase()}`);
    button.addEventListener("pointerdown", (event) => { button.setPointerCapture(event.pointerId); startMark(side, good); });
    for (const end of ["pointerup", "pointercancel"]) button.addEventListener(end, endMark);
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  }
  for (const lane of figure.querySelectorAll(".lane")) draggable(pair, side, lane);
  const stars = figure.querySelector(".stars");
  stars.setAttribute("aria-label", `Rate the ${name.toLowerCase()}`);
  for (let n = 1; n <= 5; n++) {
    const star = document.createElement("button");
    star.textContent = "★";
    star.setAttribute("aria-label", `${n} of 5`);
    star.addEventListener("click", () => rate(side, n));
    stars.append(star);
  }
  for (const mark of clip.marks) drawMark(figure, clip, mark);
  return video;
}

// A text in place of a video, that answers as one that has ended: it has no parts to mark.
function written(figure, text) {
  const shown = document.createElement("div");
  shown.className = "text";
  shown.textContent = text;
  Object.assign(shown, { currentTime: 0, readyState: 4, ended: true, play: async () => {}, pause() {}, load() {} });
  figure.querySelector("video").replaceWith(shown);
  figure.querySelector(".line").remove();
  $("play").hidden = true;
  return shown;
}

// Removing a video doesn't close its connection, and a browser allows only six.
function discard(pair) {
  for (const video of pair.videos) { video.removeAttribute("src"); video.load(); }
  pair.root.remove();
}

async function explainFailure(figure, clip) {
  const note = document.createElement("p");
  note.className = "unavailable";
  note.setAttribute("role", "alert");
  const reply = await fetch(`/video/${clip.id}`).catch(() => null);
  const content = reply && !reply.ok ? await reply.json().catch(() => ({})) : {};
  note.textContent = `This clip can’t be shown. ${content.reason || "This browser can’t play its video."}`;
  figure.querySelector("video").replaceWith(note);
}

// ---- the pair on the screen

function show() {
  const pair = pairs[0];
  for (const other of stage.children) {
    other.classList.toggle("now", pair && other === pair.root);
    other.inert = !(pair && other === pair.root);
  }
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !pair;
  if (!pair) return;
  endMark();
  pair.since = performance.now();
  choose(0);
  for (const video of pair.videos) video.currentTime = 0;
  playOrPause();
  whenVisible(pair);
}

// The moment from which a person sees the pair: both videos have a frame, and it is painted.
function whenVisible(pair) {
  if (pair !== pairs[0]) return;
  if (pair.videos.some((video) => video.readyState < 2)) {
    if (performance.now() - pair.since > 500 && $("status").textContent !== DRAWING) showStatus(DRAWING);
    setTimeout(whenVisible, 4, pair);
    return;
  }
  if ($("status").textContent === DRAWING) showStatus("");
  pair.seen = true;
  pair.since = performance.now();   // loading isn't part of the response time
  requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("pair-shown", { detail: pair.id })));
}

function playOrPause() {
  for (const pair of pairs) for (const video of pair.videos) {
    if (playing && pair === pairs[0] && !video.ended) video.play().catch(() => {});
    else video.pause();
  }
  $("play").setAttribute("aria-pressed", String(!playing));
  $("play").lastElementChild.textContent = playing ? "Pause" : "Play";
}

// Both restart together once both have ended, so that clips of different lengths stay in step.
function loopInStep(pair) {
  if (pair !== pairs[0] || pair.videos.some((video) => video.isConnected && !video.ended)) return;
  for (const video of pair.videos) video.currentTime = 0;
  playOrPause();
}

function choose(side) {
  chosen = side;
  if (pairs[0]) pairs[0].figures.forEach((figure, i) => figure.classList.toggle("chosen", i === side));
}

function frameOf(side) {
  const { videos, clips } = pairs[0];
  return Math.min(Math.floor(videos[side].currentTime * FPS + 1e-3), clips[side].frames - 1);
}

function animate() {
  const pair = pairs[0];
  if (pair) pair.figures.forEach((figure, side) => {
    const part = pair.videos[side].currentTime * FPS / pair.clips[side].frames;
    const head = figure.querySelector(".head");
    if (head) head.style.left = `${100 * Math.min(1, part)}%`;
  });
  if (growing) extendMark(growing);
  requestAnimationFrame(animate);
}

// ---- feedback

function answer(choice, event) {
  const pair = pairs[0];
  if (!pair) return;
  // One key press too many must not answer a pair that nobody has seen.
  if (!pair.seen && choice !== "skip") return showStatus("Not saved: these clips haven’t loaded yet.", true);
  performance.mark("answered", { startTime: event.timeStamp });
  const seconds = Math.min((performance.now() - pair.since) / 1000, 86400);
  answeredHere.add(pair.id);
  pairs.shift();
  discard(pair);
  show();
  enqueue(async () => {
    const state = await postUntilConfirmed("answer", { query: pair.id, choice, seconds });
    if (state) remember(state, pair.id);
    showStatus(`Saved: ${WORDS[choice].toLowerCase()}.`);
    await update(state);
  });
}

function undo() {
  enqueue(async () => {
    const last = undoable.pop();
    storeUndoable();
    if (!last) return showStatus("There is nothing to undo.");
    const state = await postUntilConfirmed("undo", { kind: last.kind, id: last.id, receipt: last.receipt });
    if (last.kind === "answer") answeredHere.delete(last.query);
    else for (const drawn of stage.querySelectorAll(`[data-undo="${last.kind}-${last.id}"]`)) erase(drawn);
    showStatus(`Undone: your last ${last.kind}.`);
    await update(state);
  });
}

function erase(drawn) {
  if (drawn.classList.contains("mark")) drawn.remove();
  else { delete drawn.dataset.undo; fillStars(drawn, 0); }
}

function fillStars(stars, n) {
  [...stars.children].forEach((star, i) => star.classList.toggle("on", i < n));
}

function rate(side, stars) {
  const pair = pairs[0];
  if (!pair) return;
  const row = pair.figures[side].querySelector(".stars");
  fillStars(row, stars);
  enqueue(async () => {
    const reply = await postUntilConfirmed("rate", { query: pair.id, side, stars });
    if (reply) { row.dataset.undo = `rating-${reply.id}`; remember(reply); }
    showStatus(`Saved: ${stars} of 5 for the ${side ? "right" : "left"} clip.`);
  });
}

function drawMark(figure, clip, mark) {
  const drawn = document.createElement("div");
  drawn.className = "mark";
  place(drawn, clip, mark.first, mark.last);
  if (mark.id) drawn.dataset.undo = `mark-${mark.id}`;
  figure.querySelector(mark.good ? ".lane.good" : ".lane.bad").append(drawn);
  return drawn;
}

function place(drawn, clip, first, last) {
  drawn.style.left = `${100 * first / clip.frames}%`;
  drawn.style.width = `${100 * (last - first + 1) / clip.frames}%`;
}

function saveMark(pair, side, first, last, good, drawn) {
  enqueue(async () => {
    try {
      const reply = await postUntilConfirmed("mark", { query: pair.id, side, first, last, good });
      if (!reply) return;
      drawn.dataset.undo = `mark-${reply.id}`;
      remember(reply);
      showStatus(`Saved: frames ${first} to ${last} of the ${side ? "right" : "left"} clip are ${good ? "good" : "bad"}.`);
    } catch (error) {
      drawn.remove();
      throw error;
    }
  });
}

let growing = null;          // mark that grows while + or − is held
function startMark(side, good) {
  if (growing || !pairs[0] || pairs[0].clips[side].text !== undefined) return;
  choose(side);
  const pair = pairs[0];
  if (pair.videos[side].ended) {   // it waits for the other clip: the mark begins with the next loop
    for (const video of pair.videos) video.currentTime = 0;
    playOrPause();
  }
  const first = frameOf(side);
  growing = { pair, side, good, first, last: first };
  growing.drawn = drawMark(pair.figures[side], pair.clips[side], { first, last: first, good });
  if (!playing) { playing = true; playOrPause(); }
}

function extendMark(mark) {
  const now = frameOf(mark.side);
  if (now < mark.last) { mark.last = mark.pair.clips[mark.side].frames - 1; endMark(); return; }  // the video restarted
  mark.last = now;
  place(mark.drawn, mark.pair.clips[mark.side], mark.first, mark.last);
}

function endMark() {
  if (!growing) return;
  const { pair, side, good, first, last, drawn } = growing;
  growing = null;
  saveMark(pair, side, first, last, good, drawn);
}

function draggable(pair, side, lane) {
  const clip = pair.clips[side], good = lane.classList.contains("good");
  let drawn = null, start = 0, to = 0;
  const at = (event) => {
    const box = lane.getBoundingClientRect();
    return Math.max(0, Math.min(clip.frames - 1, Math.floor((event.clientX - box.left) / box.width * clip.frames)));
  };
  const ends = () => [Math.min(start, to), Math.max(start, to)];
  lane.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    lane.setPointerCapture(event.pointerId);
    start = to = at(event);
    drawn = drawMark(pair.figures[side], clip, { first: start, last: to, good });
  });
  lane.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    to = at(event);
    place(drawn, clip, ...ends());
  });
  lane.addEventListener("pointerup", () => {
    if (drawn) saveMark(pair, side, ...ends(), good, drawn);
    drawn = null;
  });
  lane.addEventListener("pointercancel", () => { if (drawn) drawn.remove(); drawn = null; });
}

const KEYS = {
  ArrowLeft: (event) => answer("left", event), ArrowRight: (event) => answer("right", event),
  ArrowUp: (event) => answer("same", event), ArrowDown: (event) => answer("unsure", event),
  s: (event) => answer("skip", event), u: undo, Backspace: undo,
  f: () => choose(1 - chosen),
  " ": () => { playing = !playing; playOrPause(); },
};
for (const n of [1, 2, 3, 4, 5]) KEYS[n] = () => rate(chosen, n);
const SIGNS = { "+": true, "=": true, "-": false, "−": false, "_": false };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("work").hidden) return;
  if (event.target.closest("input, summary") || (event.key === " " && event.target.closest("button"))) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (!(key in KEYS) && !(key in SIGNS)) return;
  event.preventDefault();
  if (event.repeat) return;   // a key that is held down counts once
  if (key in SIGNS) startMark(chosen, SIGNS[key]);
  else KEYS[key](event);
});
document.addEventListener("keyup", (event) => { if (event.key in SIGNS) endMark(); });
window.addEventListener("blur", endMark);
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", (event) => answer(button.dataset.choice, event));
$("undo").addEventListener("click", undo);
$("play").addEventListener("click", KEYS[" "]);
$("welcome").addEventListener("submit", (event) => {
  event.preventDefault();
  post("name", { name: $("name").value }).then(update).catch((error) => showStatus(error.message, true));
});
window.addEventListener("pagehide", () => { if (!unsaved) navigator.sendBeacon("/api/leave"); });
window.addEventListener("pageshow", (event) => { if (event.persisted) renew(); });

// ---- what the agent has learned so far

async function refreshLearned() {
  const reply = await fetch("/api/learned").then((r) => r.ok ? r.json() : null).catch(() => null);
  if (reply && reply.curve.length) { $("learned").hidden = false; drawCurve(reply.curve); }
  const best = await fetch("/video/best").catch(() => null);
  if (best && best.ok) {
    const video = $("best").querySelector("video"), etag = best.headers.get("etag");
    if (video.dataset.etag !== etag) {
      video.dataset.etag = etag;
      URL.revokeObjectURL(video.src);
      video.src = URL.createObjectURL(await best.blob());
      if (playing) video.play().catch(() => {});
      $("learned").hidden = $("best").hidden = false;
    }
  }
  setTimeout(refreshLearned, 20000);
}

function drawCurve(rows) {
  const xs = rows.map((row) => row[1]), ys = rows.map((row) => row[2]);
  const low = Math.min(0, ...ys), high = Math.max(0, ...ys), most = Math.max(1, ...xs);
  const x = (v) => 50 + 240 * v / most, y = (v) => 130 - 115 * (v - low) / (high - low || 1);
  const points = xs.map((v, i) => `${x(v).toFixed(1)},${y(ys[i]).toFixed(1)}`);
  const svg = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const number = (v) => Math.round(v).toLocaleString("en");
  const last = xs.length - 1;
  $("curve").hidden = false;
  $("curve").querySelector("g").replaceChildren(
    svg("line", { x1: 50, x2: 290, y1: y(0), y2: y(0) }),
    svg("path", { d: "M" + points.join("L") }),
    svg("circle", { cx: x(xs[last]), cy: y(ys[last]), r: 3 }),
    ...[...new Set([low, high])].map((v) => svg("text", { x: 44, y: y(v) + 3, "text-anchor": "end" }, number(v))),
    svg("text", { x: 290, y: 146, "text-anchor": "end" }, `${number(most)} steps`),
  );
  $("curve-says").textContent =
    `Task return: ${number(ys[last])} after ${number(xs[last])} steps and ${number(rows[last][0])} comparisons.`;
}

animate();
renew();
setTimeout(refreshLearned, 1500);   // after the first pair, which is more urgent
