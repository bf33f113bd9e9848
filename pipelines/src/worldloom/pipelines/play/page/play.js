/* The page of `worldloom play`, in the words of docs/protocol.md.

     messages of the server   ->  canvas, numbers, panels
     keys, clicks, touches    ->  held controls, newest last  ->  "input" messages

   It loads nothing from elsewhere; what it keeps is this tab's client id, to come back with. */
"use strict";

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token") ?? "";

let world = null; // the "welcome" message
let state = null; // the newest "state" message

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function withToken(path) {
  const url = new URL(path, location.origin);
  if (!url.searchParams.has("token")) url.searchParams.set("token", token);
  return url.href;
}

/* ---- What the page says: cards on top for all, a live region for who listens ---- */

let spoken = "";

function speak(text) {
  if (text === spoken) return;
  spoken = text;
  $("live").textContent = text;
}

function notice(id, text, { trouble = false, seconds = 0, action = null } = {}) {
  const before = $(`notice-${id}`);
  if (before && !seconds && before.firstChild.textContent === text) return; // said, and still there
  before?.remove();
  const card = make("div", { id: `notice-${id}`, className: trouble ? "notice trouble" : "notice" });
  card.setAttribute("role", trouble ? "alert" : "status");
  card.append(make("p", { textContent: text }));
  if (action) card.append(make("button", { type: "button", textContent: action[0], onclick: action[1] }));
  const close = make("button", { type: "button", className: "quiet", textContent: "✕" });
  close.setAttribute("aria-label", "Dismiss");
  close.onclick = () => card.remove();
  if (seconds) {
    card.append(close);
    // It stays for as long as somebody reads or is about to press something in it.
    const leave = () => (card.matches(":hover, :focus-within") ? setTimeout(leave, 1000) : card.remove());
    setTimeout(leave, seconds * 1000);
  }
  $("notices").append(card);
}

const dismiss = (id) => $(`notice-${id}`)?.remove();

/* ---- The connection: comes back by itself, and says so ---- */

const TAKEN_OVER = 4001;
const BUSY = 4009;
const RETRY_MS = [300, 600, 1200, 2500, 5000];

let socket = null;
let failures = 0;
let retry = 0;

function clientId() {
  let id = sessionStorage.getItem("client");
  if (!id) {
    // Not randomUUID: that is missing where a page is served without https and not from localhost.
    id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("client", id);
  }
  return id;
}

function connect() {
  clearTimeout(retry);
  socket?.close(); // one that is still on its way would take the seat of the next
  const query = new URLSearchParams({ token, client: clientId() });
  const opened = new WebSocket(`${location.origin.replace(/^http/, "ws")}/play?${query}`, "worldloom.play.1");
  socket = opened;
  opened.binaryType = "arraybuffer";
  opened.onmessage = (event) => {
    if (opened !== socket) return;
    if (typeof event.data === "string") hear(JSON.parse(event.data));
    else receiveFrame(event.data);
  };
  opened.onclose = (event) => opened === socket && lose(event);
}

function lose(event) {
  socket = null;
  releaseAll();
  awaitedPosition = null;
  $("stage").classList.add("away");
  setLink("waiting", event.code === BUSY ? "Busy" : "Not connected");
  if (event.code === TAKEN_OVER) {
    setLink("waiting", "Elsewhere");
    notice("link", "This world is being played in another tab now.", { trouble: true, action: ["Play here", connect] });
    return;
  }
  const wait = event.code === BUSY ? 5000 : RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];
  failures += 1;
  retry = setTimeout(connect, wait);
  if (event.code === BUSY) return;
  if (failures === 1) notice("link", "The connection is gone. Trying again…", { trouble: true, action: ["Try now", connect] });
  if (failures > 1) findReason();
}

/** A refused socket says nothing; the page's own address tells a lost token from a stopped server. */
async function findReason() {
  let text = "The server does not answer. Is worldloom play still running? Trying again…";
  try {
    const answer = await fetch(withToken("/"), { cache: "no-store" });
    if (answer.status === 403) {
      text = "The server was started again and has a new token. Open the address that it printed.";
    } else text = "The connection is gone. Trying again…";
  } catch {
    // No answer at all: the text above.
  }
  if (!socket || socket.readyState !== WebSocket.OPEN) {
    notice("link", text, { trouble: true, action: ["Try now", connect] });
  }
}

function setLink(kind, text) {
  $("link").dataset.state = kind;
  $("link").textContent = text;
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function hear(message) {
  if (message.type === "welcome") welcome(message);
  else if (message.type === "state") showState(message);
  else if (message.type === "recorded") showRecording(message);
  else if (message.type === "error") {
    awaitedPosition = null;
    stepping = false;
    notice("error", message.message, { trouble: true, seconds: 12 });
  } else if (message.type === "busy") {
    setLink("waiting", "Busy");
    notice("link", `${message.message} Trying again every few seconds.`, { trouble: true, action: ["Try now", connect] });
  }
}

function welcome(message) {
  const first = world === null;
  const again = !first && JSON.stringify(message.controls) === JSON.stringify(world.controls) && message.world === world.world;
  world = message;
  failures = 0;
  dismiss("link");
  $("stage").classList.remove("away");
  setLink("open", "Connected");
  if (!again) {
    const name = world.world.split(/[\\/]/).slice(-2).join("/");
    document.title = `${name} · worldloom`;
    $("world").textContent = name;
    $("world").title = world.world;
    for (const canvas of [$("canvas"), $("companion-canvas")]) {
      canvas.width = world.width;
      canvas.height = world.height;
    }
    buildKeys();
    buildHelp();
    buildGallery();
    buildPace();
    buildCompare();
    buildSettings();
    fit();
  }
  if (first) {
    speak(`Connected to ${$("world").textContent}.`);
    if (document.activeElement === document.body) $("stage").focus({ preventScroll: true });
  } else {
    notice("back", world.resumed ? "Connected again, where you were." : "Connected again. The world starts over.", { seconds: 4 });
  }
  inputNumber = 0;
  answered = 0;
  received = 0;
  stepping = false;
  sentAt.clear();
  for (const name of heldBy.keys()) pressedAt.set(name, 1);
  forget(...letGo); // which also says what is held: the first input of this connection
}

/* ---- Frames: decoded off the main thread, the newest painted, the rest counted ---- */

const text = new TextDecoder();
const surfaces = [$("canvas"), $("companion-canvas")].map((canvas) => canvas.getContext("2d", { alpha: false }));
const few = make("canvas", { width: 6, height: 6 }).getContext("2d");
const glow = $("glow").getContext("2d");
let shoneAt = 0;
let newest = null; // what came last and is not decoded yet
let painting = false;
let droppedHere = 0;
let received = 0; // on this connection
let shown = null; // the header of the frame on the canvas
const paintedAt = [];

function receiveFrame(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(text.decode(new Uint8Array(buffer, 4, length)));
  received += 1;
  // Without this, frames would queue in tunnels and buffers where nobody can drop them any more.
  if (world.window) send({ type: "seen", frames: received });
  let offset = 4 + length;
  const pictures = header.sizes.map((size) => {
    const picture = new Blob([new Uint8Array(buffer, offset, size)]);
    offset += size;
    return picture;
  });
  if (newest) droppedHere += 1;
  newest = { header, pictures };
  if (!painting) paintFrames();
}

async function paintFrames() {
  painting = true;
  while (newest) {
    const { header, pictures } = newest;
    newest = null;
    try {
      const bitmaps = await Promise.all(pictures.map((picture) => createImageBitmap(picture)));
      bitmaps.forEach((bitmap, index) => {
        surfaces[index].drawImage(bitmap, 0, 0, world.width, world.height);
        bitmap.close();
      });
      shine();
      afterPaint(header);
    } catch (error) {
      notice("error", `A frame could not be drawn (${error.message}).`, { trouble: true, seconds: 12 });
    }
  }
  painting = false;
}

/** The light around the picture follows slowly, so that a flash in the world is none on the wall.

    Six by six colours, stretched twice: a CSS blur looks the same and took 20 ms a frame on a CPU. */
function shine() {
  const now = performance.now();
  if (now - shoneAt < 80) return;
  glow.globalAlpha = shoneAt ? 0.2 : 1;
  shoneAt = now;
  few.drawImage($("canvas"), 0, 0, 6, 6);
  glow.imageSmoothingQuality = "high";
  glow.drawImage(few.canvas, 0, 0, 48, 48);
}

function afterPaint(header) {
  const now = performance.now();
  stepping = false;
  paintedAt.push(now);
  if (sentAt.has(header.n)) trip = now - sentAt.get(header.n);
  for (const n of sentAt.keys()) if (n <= header.n) sentAt.delete(n);
  answered = header.n;
  shown = header;
  $("companion").classList.toggle("ended", comparing() && header.sizes.length < 2);
  if (comparing()) captionCompanion(header.sizes.length < 2);
  $("hud-action").textContent = header.action || "none yet";
  if (awaitedPosition === header.position) awaitedPosition = null;
  showPosition(header.position, header.length);
  showHeld();
  letGoOfTaps();
  followRewind();
}

/** Four times a second: numbers that change with every frame cannot be read. */
function showNumbers() {
  const now = performance.now();
  while (paintedAt.length && paintedAt[0] < now - 2000) paintedAt.shift();
  const span = paintedAt.length > 1 ? paintedAt.at(-1) - paintedAt[0] : 0;
  const moving = span > 0 && now - paintedAt.at(-1) < 1000;
  const put = (id, value, unit = "") => {
    if ($(id).textContent === value + unit) return;
    $(id).replaceChildren(value, ...(unit ? [make("small", { textContent: unit })] : []));
  };
  put("hud-fps", moving ? (((paintedAt.length - 1) * 1000) / span).toFixed(1) : "–");
  if (!shown) return;
  const milliseconds = (value) => (value < 9.95 ? value.toFixed(1) : value.toFixed(0));
  if (shown.model_ms) put("hud-model", milliseconds(shown.model_ms), " ms");
  if (trip !== null) put("hud-trip", milliseconds(trip), " ms");
  put("hud-dropped", String(shown.dropped + droppedHere));
  put("hud-context", String(shown.context_frames), world.context_frames ? ` of ${world.context_frames}` : "");
}

/** Every pixel of the world becomes a square of whole screen pixels, as large as the stage takes. */
function fit() {
  if (!world) return;
  const views = $("views");
  const two = comparing();
  const ratio = devicePixelRatio || 1;
  const caption = two ? 26 : 0;
  const scaleFor = (across, down) => {
    const width = (views.clientWidth - 20 * (across - 1)) / across;
    const height = (views.clientHeight - 10 * (down - 1)) / down - caption;
    return Math.min((width * ratio) / world.width, (height * ratio) / world.height);
  };
  const beside = scaleFor(two ? 2 : 1, 1);
  const stacked = two ? scaleFor(1, 2) : 0;
  const room = Math.max(beside, stacked);
  const scale = room >= 1 ? Math.floor(room) : room;
  views.classList.toggle("stacked", stacked > beside);
  for (const canvas of [$("canvas"), $("companion-canvas")]) {
    canvas.classList.toggle("crisp", scale >= 1);
    canvas.style.width = `${(world.width * scale) / ratio}px`;
    canvas.style.height = `${(world.height * scale) / ratio}px`;
  }
}

/* ---- Held controls: from keyboard, mouse, fingers, whoever presses; the newest last ---- */

const heldBy = new Map(); // name of a control -> who holds it, in the order pressed
const pressedAt = new Map(); // name -> the input that first said so
const letGo = new Set(); // released before a frame had seen them
const sentAt = new Map();
let inputNumber = 0;
let answered = 0;
let trip = null;
let controlOfCode = new Map();

function hold(name, source) {
  if (state?.autoplay) send({ type: "autoplay", on: false });
  letGo.delete(name);
  const sources = heldBy.get(name);
  if (sources) {
    sources.add(source);
    return;
  }
  heldBy.set(name, new Set([source]));
  sendInput();
  pressedAt.set(name, inputNumber);
  if (state && !state.running && state.length === 0) {
    run(true);
    sentAt.set(inputNumber, performance.now());
  }
}

function release(name, source) {
  const sources = heldBy.get(name);
  if (!sources?.delete(source) || sources.size) return;
  // A tap shorter than a frame still counts: it is let go once a frame has answered it.
  if (state?.running && pressedAt.get(name) > answered) {
    letGo.add(name);
    const pressed = pressedAt.get(name);
    const patience = Math.max(1000, 3 * (shown?.model_ms ?? 0));
    setTimeout(() => letGo.has(name) && pressedAt.get(name) === pressed && forget(name), patience);
  } else forget(name);
}

function forget(...names) {
  for (const name of names) {
    heldBy.delete(name);
    letGo.delete(name);
  }
  sendInput();
}

function letGoOfTaps() {
  const seen = [...letGo].filter((name) => pressedAt.get(name) <= answered);
  if (seen.length) forget(...seen);
}

function releaseAll() {
  if (heldBy.size) forget(...heldBy.keys());
}

function sendInput() {
  inputNumber += 1;
  if (state?.running) sentAt.set(inputNumber, performance.now());
  send({ type: "input", held: [...heldBy.keys()], n: inputNumber });
  showHeld();
}

function showHeld() {
  const held = new Set(heldBy.keys());
  if (state?.autoplay) for (const name of shown?.held ?? []) held.add(name);
  for (const key of $("keys").querySelectorAll(".key")) {
    const down = held.has(key.dataset.name);
    key.classList.toggle("held", down);
    key.classList.toggle("latched", heldBy.get(key.dataset.name)?.has("latch") ?? false);
    if (key.getAttribute("aria-pressed") !== String(down)) key.setAttribute("aria-pressed", down);
  }
}

/* ---- The keyboard: the world's keys first, the page's own on what it leaves free ---- */

const COMMANDS = [
  { id: "pause", label: "Play or pause", codes: ["Space", "KeyP"], act: () => run(!state?.running) },
  { id: "back", label: "One frame back", codes: ["Comma", "KeyB"], act: () => goTo(state.position - 1) },
  { id: "step", label: "One frame on", codes: ["Period", "KeyN"], act: stepOnce },
  { id: "reset", label: "Start over", codes: ["KeyR", "Backspace"], act: () => reset() },
  { id: "autoplay", label: "Let it play", codes: ["KeyL", "KeyT"], act: () => $("autoplay").click() },
  { id: "full", label: "Full screen", codes: ["KeyF", "KeyG"], act: fullScreen },
  { id: "help", label: "These keys", codes: ["Slash", "KeyH"], act: openHelp },
];
const ARROWS = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right" };
const GROUPS = { move: "Move", look: "Look", act: "Act", choose: "Choose", other: "Other keys" };
const CAPS = {
  ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Space: "Space", Period: ".", Comma: ",", Slash: "?",
  Backspace: "⌫", Enter: "Enter", ShiftLeft: "Shift", ShiftRight: "right Shift", ControlLeft: "Ctrl",
  ControlRight: "right Ctrl", AltLeft: "Alt", AltRight: "right Alt", Semicolon: ";", Quote: "'", Minus: "-",
  Equal: "=", BracketLeft: "[", BracketRight: "]", Backquote: "`", Backslash: "\\",
}; // prettier-ignore
let commandOfCode = new Map();
let layout = null; // what is printed on this person's keys, where the browser tells

function cap(code) {
  return CAPS[code] ?? layout?.get(code)?.toUpperCase() ?? code.replace(/^(Key|Digit)/, "").replace(/^Numpad/, "Num ");
}

function usedBy(target, code) {
  if ($("help").open) return true;
  if (target.matches("input:not([type=range], [type=radio]), select, textarea")) return true;
  if (target.matches("input") && /^(Arrow|Page|Home|End)/.test(code)) return true;
  if (target.matches("input[type=radio], button, a, summary, select") && /^(Space|Enter)$/.test(code)) return true;
  return false;
}

addEventListener("keydown", (event) => {
  if (event.code === "Escape" && !$("help").open && !document.fullscreenElement) $("stage").focus();
  if (!world || usedBy(event.target, event.code)) return;
  const name = controlOfCode.get(event.code);
  // With Ctrl, Alt or Meta it is the browser's, unless that key is one of the world's own.
  if (event.metaKey) return releaseAll();
  const modified = (event.ctrlKey && !/^Control/.test(event.code)) || (event.altKey && !/^Alt/.test(event.code));
  if (modified && ![...controlOfCode.keys()].some((code) => /^(Control|Alt)/.test(code))) return;
  if (name !== undefined) {
    event.preventDefault();
    if (!event.repeat) hold(name, event.code);
    return;
  }
  const command = commandOfCode.get(event.code);
  if (!command || modified) return;
  event.preventDefault();
  if (!event.repeat || command.id === "back" || (command.id === "step" && !stepping)) command.act();
});

addEventListener("keyup", (event) => {
  const name = controlOfCode.get(event.code);
  if (name !== undefined) release(name, event.code);
});

// Whoever looks elsewhere holds nothing: the release of a key would never arrive here.
addEventListener("blur", releaseAll);
addEventListener("pagehide", releaseAll);
addEventListener("contextmenu", (event) => event.defaultPrevented || releaseAll());
document.addEventListener("visibilitychange", () => document.hidden && releaseAll());
addEventListener("focusin", (event) => event.target.matches("input, select, dialog *") && releaseAll());

/* ---- Keys on the screen ---- */

function buildKeys() {
  controlOfCode = new Map();
  const groups = new Map();
  for (const control of world.controls) {
    for (const code of control.keys) controlOfCode.set(code, control.name);
    if (!groups.has(control.group)) groups.set(control.group, []);
    groups.get(control.group).push(control);
  }
  commandOfCode = new Map();
  for (const command of COMMANDS) {
    command.code = command.codes.find((code) => !controlOfCode.has(code) && !commandOfCode.has(code));
    if (command.code) commandOfCode.set(command.code, command);
  }
  $("keys").replaceChildren();
  for (const [group, controls] of groups) {
    const box = make("div", { className: "keygroup" });
    box.setAttribute("role", "group");
    if (group) box.setAttribute("aria-label", GROUPS[group] ?? group);
    const places = controls.map((control) => ARROWS[control.keys.find((code) => code in ARROWS)]);
    const arrows = new Set(places.filter(Boolean)).size > 1 && places.every(Boolean);
    if (arrows) box.classList.add("arrows");
    if (arrows && !places.includes("up") && !places.includes("down")) box.classList.add("flat");
    if (!arrows && controls.length > 4) box.classList.add("many");
    controls.forEach((control, index) => box.append(keyButton(control, arrows ? places[index] : "")));
    $("keys").append(box);
  }
  if (!world.controls.length) {
    $("keys").append(make("p", { className: "note", textContent: "This world has no actions: it goes on by itself." }));
  }
  for (const [id, command] of [["run", "pause"], ["back", "back"], ["step", "step"], ["reset", "reset"], ["full", "full"]]) {
    const { label, code } = COMMANDS.find((one) => one.id === command);
    $(id).title = code ? `${label} (${cap(code)})` : label;
  }
  $("record").title = "Record";
}

function keyButton(control, place) {
  const key = make("button", { type: "button", className: `key ${place}`.trim() });
  const caps = control.keys.map(cap);
  key.dataset.name = control.name;
  key.setAttribute("aria-pressed", "false");
  key.setAttribute("aria-label", caps.length ? `${control.label}, key ${caps.join(" or ")}` : control.label);
  key.title = caps.length > 1 ? `${control.label}: ${caps.join(" or ")}` : control.label;
  const line = make("b", {});
  caps.forEach((one, index) => {
    if (index) line.append(make("small", { textContent: " or " }));
    line.append(make("kbd", { textContent: one }));
  });
  if (caps.length) key.append(line);
  key.append(make("span", { textContent: control.label }));
  const { name } = control;
  key.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault(); // the focus stays where it is
    if (event.shiftKey && event.pointerType === "mouse") {
      if (heldBy.get(name)?.has("latch")) release(name, "latch");
      else hold(name, "latch");
      showHeld();
      return;
    }
    release(name, "latch");
    key.setPointerCapture(event.pointerId);
    hold(name, `pointer ${event.pointerId}`);
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    key.addEventListener(end, (event) => release(name, `pointer ${event.pointerId}`));
  }
  key.addEventListener("keydown", (event) => {
    if (!/^(Space|Enter)$/.test(event.code)) return;
    event.preventDefault();
    if (!event.repeat) hold(name, "button");
  });
  key.addEventListener("keyup", (event) => {
    if (!/^(Space|Enter)$/.test(event.code)) return;
    event.preventDefault();
    release(name, "button");
  });
  key.addEventListener("blur", () => release(name, "button"));
  key.addEventListener("contextmenu", (event) => event.preventDefault());
  key.addEventListener("click", (event) => {
    if (event.pointerType || event.detail) return; // a pointer has held it already
    hold(name, "tap"); // a screen reader clicks without pressing
    setTimeout(() => release(name, "tap"), 150);
  });
  return key;
}

function buildHelp() {
  const rows = (title, entries) => {
    const table = make("table", {}, make("caption", { textContent: title }));
    for (const [label, codes] of entries) {
      const cell = make("td", {}, ...codes.map((code) => make("kbd", { textContent: cap(code) })));
      const head = make("th", { textContent: label });
      head.scope = "row";
      table.append(make("tr", {}, head, cell));
    }
    return table;
  };
  const controls = world.controls.map(({ label, keys }) => [label, keys]);
  const commands = COMMANDS.filter(({ id, code }) => code && (id !== "autoplay" || world.can_act));
  $("help-body").replaceChildren(
    ...(controls.length ? [rows("In the world", controls)] : []),
    rows("On this page", commands.map(({ label, code }) => [label, [code]])),
  );
}

function openHelp() {
  releaseAll();
  $("help").showModal();
}

/* ---- Time: play, pause, step, back, start over, rewind ---- */

const LONGEST_REWIND_MS = 1500; // then the next one goes, whatever became of it
let awaitedPosition = null; // a rewind that is on its way
let awaitedSince = 0;
let wantedPosition = null; // where the slider went since
let stepping = false; // a step is on its way: a key that repeats waits for it

function run(on) {
  sentAt.clear();
  if (on && wantedPosition !== null) send({ type: "rewind", position: wantedPosition });
  if (on) wantedPosition = awaitedPosition = null;
  send({ type: "run", on });
}

function stepOnce() {
  stepping = true;
  if (state?.running) run(false);
  if (wantedPosition !== null) send({ type: "rewind", position: wantedPosition });
  wantedPosition = awaitedPosition = null;
  sentAt.set(inputNumber, performance.now()); // nothing answers a key before it
  send({ type: "step" });
}

function goTo(position) {
  if (!state) return;
  wantedPosition = Math.max(0, Math.min(position, state.length));
  state.position = wantedPosition; // so that the next press counts from here
  if (state.running) run(false);
  followRewind();
}

function awaited() {
  return performance.now() - awaitedSince < LONGEST_REWIND_MS ? awaitedPosition : null;
}

/** One rewind at a time: a slider is faster than a world, and only its last place matters. */
function followRewind() {
  if (wantedPosition === null || awaited() !== null) return;
  awaitedPosition = wantedPosition;
  awaitedSince = performance.now();
  wantedPosition = null;
  changedAt.clear(); // the settings of then come back with the position
  send({ type: "rewind", position: awaitedPosition });
}

function reset(what = {}, { stay = false } = {}) {
  wantedPosition = awaitedPosition = null;
  const seed = $("seed").valueAsNumber;
  send({ type: "reset", ...(Number.isSafeInteger(seed) && seed >= 0 ? { seed } : {}), ...what });
  if (!stay) $("stage").focus({ preventScroll: true });
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("playing").requestFullscreen?.();
}

function showPosition(position, length) {
  const going = wantedPosition ?? awaited() ?? position;
  if (state) Object.assign(state, { position: going, length });
  const slider = $("rewind");
  if (slider.max !== String(length)) slider.max = length;
  if (going === position) slider.value = position;
  slider.disabled = length === 0;
  slider.setAttribute("aria-valuetext", `frame ${going} of ${length}`);
  $("position").textContent = `${going} / ${length}`;
  if (going === 0 && document.activeElement === $("back")) $("stage").focus({ preventScroll: true });
  $("back").disabled = going === 0;
  showBadge();
}

function showBadge() {
  if (!state) return;
  const { running, position, length } = state;
  const past = position < length;
  const atStart = !running && position === 0 && !past;
  $("badge").hidden = running || atStart;
  $("badge").textContent = past ? `Frame ${position} of ${length}. Play on from here: a new branch` : "Paused";
  $("begin").hidden = !atStart;
  $("begin-hint").hidden = !atStart || !world?.controls.length;
}

function showState(message) {
  const before = state;
  state = message;
  state.position = wantedPosition ?? awaited() ?? state.position;
  const { running } = state;
  $("run-icon").setAttribute("href", running ? "#i-pause" : "#i-play");
  $("run").setAttribute("aria-label", running ? "Pause" : "Play");
  $("autoplay").setAttribute("aria-pressed", state.autoplay);
  $("record").setAttribute("aria-pressed", state.recording);
  $("record").setAttribute("aria-label", state.recording ? "End the recording" : "Record");
  $("recording-badge").hidden = !state.recording;
  if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  for (const start of $("gallery").children) start.setAttribute("aria-pressed", start.dataset.start === String(state.start));
  showPace();
  showCompare(before?.compare !== state.compare);
  showSettings();
  showPosition(state.position, state.length);
  showHeld();
  if (!before) return;
  if (before.running !== running) speak(running ? "Playing." : `Paused at frame ${state.position}.`);
  if (before.recording !== state.recording) speak(state.recording ? "Recording." : "Recording ended.");
  if (before.autoplay !== state.autoplay) speak(state.autoplay ? "The world plays by itself." : "You steer.");
}

/* ---- Starts: the gallery, a picture of one's own, the seed ---- */

function buildGallery() {
  $("gallery").replaceChildren(...world.starts.map(({ label, url }, index) => {
    const picture = make("img", { src: withToken(url), alt: "", loading: "lazy", draggable: false });
    const start = make("button", { type: "button", title: label, onclick: () => reset({ start: index }) }, picture);
    start.dataset.start = index;
    start.setAttribute("aria-label", `Start from ${label}`);
    start.setAttribute("aria-pressed", "false");
    return start;
  }));
}

const LARGEST_PICTURE = 8 << 20;

async function startFromPicture(file) {
  try {
    const body = await readablePicture(file);
    const answer = await fetch(withToken("/picture"), { method: "POST", body, headers: { "Content-Type": "application/octet-stream" } });
    if (!answer.ok) throw new Error((await answer.text()).trim() || `the server answered ${answer.status}`);
    const { picture } = await answer.json();
    dismiss("error");
    reset({ picture });
    speak("Starting from your picture.");
  } catch (error) {
    notice("error", `${file.name}: ${error.message}`, { trouble: true, seconds: 12 });
  }
}

/** PNG and JPEG go as they are; what else the browser can show, and what is too large, is redrawn. */
async function readablePicture(file) {
  if (/^image\/(png|jpeg)$/.test(file.type) && file.size <= LARGEST_PICTURE) return file;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("not a picture that this browser can read; a PNG or JPEG is");
  }
  const scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => event.relatedTarget === null && ($("drop").hidden = true));
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  if (event.dataTransfer.files[0]) startFromPicture(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => event.clipboardData?.files[0] && startFromPicture(event.clipboardData.files[0]));

/* ---- Pace, comparison, settings, recordings ---- */

function buildChoice(box, name, options, choose) {
  box.replaceChildren(...options.map(([value, label, note]) => {
    const input = make("input", { type: "radio", name, value, onchange: () => choose(value) });
    const lines = [label, ...(note ? [make("small", { textContent: note })] : [])];
    return make("label", {}, input, ...lines.map((line) => (typeof line === "string" ? make("span", { textContent: line }) : line)));
  }));
}

function check(box, value) {
  for (const input of box.querySelectorAll("input")) input.checked = input.value === String(value);
}

const USUAL_FPS = 10;
const gameRate = () => world.fps || USUAL_FPS; // some recordings do not say

function buildPace() {
  const rate = (value) => `${+value.toFixed(2)} fps`;
  const usual = gameRate();
  const paces = [
    [usual, world.fps ? "Game" : "Usual", rate(usual)],
    [2 * usual, "Twice", rate(2 * usual)],
    [0, "Fastest", "all it can"],
  ];
  buildChoice($("pace"), "pace", paces, (value) => send({ type: "pace", frames_per_s: value }));
}

const showPace = () => check($("pace"), state.pace);

const COMPANIONS = { none: "Nothing", game: "The real game", truth: "What happened" };

function buildCompare() {
  $("compare-section").hidden = !world.companions.length;
  const options = ["none", ...world.companions].map((name) => [name, COMPANIONS[name] ?? name, ""]);
  buildChoice($("compare"), "compare", options, (name) => send({ type: "compare", with: name }));
}

const comparing = () => Boolean(state && state.compare && state.compare !== "none");

function captionCompanion(ended) {
  const name = { game: "The real game", truth: "What truly happened" }[state.compare] ?? state.compare;
  const caption = ended ? `${name}: no more of it` : name;
  if ($("companion-caption").textContent !== caption) $("companion-caption").textContent = caption;
}

function showCompare(changed) {
  check($("compare"), state.compare);
  if (!changed) return;
  $("companion").hidden = !comparing();
  $("views").classList.toggle("compared", comparing());
  if (comparing()) captionCompanion(false);
  fit();
}

const SETTINGS = [
  { name: "temperature", label: "Temperature", max: 2, step: 0.05, note: "0 is the likeliest code; more is bolder." },
  { name: "min_p", label: "Min-p", max: 1, step: 0.01, note: "Drops what is this much less likely than the likeliest." },
  { name: "guidance_scale", label: "Guidance", max: 5, step: 0.1, guided: true, note: "Above 1, keys count for more." },
  { name: "parallel_keep_frac", label: "Guidance kept", max: 1, step: 0.05, guided: true, more: true },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, more: true },
  { name: "top_k", label: "Top-k (0 keeps all)", max: 100, step: 1, more: true },
  { name: "refinements", label: "Refinements", min: 1, max: 16, step: 1, more: true, decoder: "maskgit" },
];
const changedAt = new Map();
let unsent = {};
let sending = 0;

/** A dragged slider changes sixty times a second; the server hears of it twenty times. */
function change(name, value) {
  changedAt.set(name, performance.now());
  unsent[name] = value;
  sending ||= setTimeout(() => {
    send({ type: "settings", ...unsent });
    unsent = {};
    sending = 0;
  }, 50);
}

function buildSettings() {
  $("settings").replaceChildren();
  $("more-settings").replaceChildren();
  const fits = ({ name, decoder }) => name in world.settings && (!decoder || world.decoders.includes(decoder));
  for (const setting of SETTINGS.filter(fits)) {
    const off = setting.guided && !world.guidable;
    if (off && setting.more) continue;
    const { name, min = 0, max, step } = setting;
    const id = `setting-${name}`;
    const input = make("input", { type: "range", id, min, max, step, disabled: off });
    const output = make("output", { id: `${id}-value` });
    input.oninput = () => {
      output.textContent = input.value;
      change(name, input.valueAsNumber);
    };
    const label = make("label", { htmlFor: id, textContent: setting.label });
    const note = off ? "Nothing to guide by: this world has no actions." : setting.note;
    const row = make("div", { className: off ? "setting off" : "setting" }, label, output, input);
    if (note) {
      row.append(make("p", { className: "note", id: `${id}-note`, textContent: note }));
      input.setAttribute("aria-describedby", `${id}-note`);
    }
    (setting.more ? $("more-settings") : $("settings")).append(row);
  }
  $("more").hidden = !$("more-settings").children.length;
  if (world.decoders.length) {
    let byPointer = false;
    const select = make("select", {
      id: "setting-decoder",
      // In braces: a handler that returns false takes the key away, and Tab would not leave.
      onpointerdown: () => { byPointer = true; },
      onkeydown: () => { byPointer = false; },
      onchange: () => {
        change("decoder", select.value);
        if (byPointer) $("stage").focus({ preventScroll: true });
      },
    });
    select.append(...world.decoders.map((name) => make("option", { value: name, textContent: name })));
    const label = make("label", { htmlFor: "setting-decoder", textContent: "Decoder" });
    $("settings").append(make("div", { className: "setting" }, label, select));
  }
  $("autoplay").disabled = !world.can_act;
  $("autoplay-note").textContent = world.can_act
    ? "It guesses what a player would do. Any key takes over."
    : "This model has no action head: it was trained without guessing actions.";
}

function showSettings() {
  const now = performance.now();
  for (const [name, value] of Object.entries(state.settings)) {
    const input = $(`setting-${name}`);
    if (!input || now - (changedAt.get(name) ?? -1e9) < 600) continue; // an answer to an older place
    if (input.tagName === "SELECT" && ![...input.options].some((option) => option.value === value)) {
      input.prepend(make("option", { value, textContent: value }));
    }
    input.value = value;
    if ($(`setting-${name}-value`)) $(`setting-${name}-value`).textContent = String(+Number(value).toFixed(3));
  }
}

function showRecording({ mp4, json, frames }) {
  const link = (href, label) => make("a", { href: withToken(href), download: "", textContent: label });
  const length = `${frames} frames, ${(frames / gameRate()).toFixed(1)} s`;
  const item = make("li", {}, make("span", { textContent: length }), link(mp4, "Video"), link(json, "Actions"));
  $("recordings").prepend(item);
  $("recordings-section").hidden = false;
  notice("recorded", `Recorded ${length}.`, { seconds: 15, action: ["Save the video", () => item.querySelector("a").click()] });
}

/* ---- Buttons ---- */

$("run").onclick = () => run(!state?.running);
$("begin").onclick = () => {
  run(true);
  $("stage").focus({ preventScroll: true }); // the button goes, and would take the focus with it
};
$("step").onclick = stepOnce;
$("back").onclick = () => goTo(state.position - 1);
$("reset").onclick = () => reset();
$("record").onclick = () => send({ type: "record", on: !state?.recording });
$("full").onclick = fullScreen;
$("full").hidden = !document.fullscreenEnabled;
// What is outside of the element that fills the screen is not seen.
addEventListener("fullscreenchange", () => (document.fullscreenElement ?? document.body).append($("notices")));
$("autoplay").onclick = () => {
  if (!world?.can_act || !state) return;
  send({ type: "autoplay", on: !state.autoplay });
  if (!state.autoplay && !state.running) run(true);
};
$("rewind").oninput = () => goTo($("rewind").valueAsNumber);
// Arrow keys change a number field step by step, and each step is a change: the focus stays in it.
$("seed").onchange = () => reset({}, { stay: true });
$("seed").addEventListener("keyup", (event) => event.key === "Enter" && $("stage").focus({ preventScroll: true }));
$("dice").onclick = () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1e6;
  reset();
};
$("upload").onclick = () => $("file").click();
$("file").onchange = () => {
  if ($("file").files[0]) startFromPicture($("file").files[0]);
  $("file").value = ""; // so that the same file can be taken again
};
$("help-open").onclick = openHelp;
$("help-close").onclick = () => $("help").close();
$("help").addEventListener("close", () => $("stage").focus({ preventScroll: true }));

// After a click or a drag with a pointer the keys are the world's again; the keyboard stays where it is.
let pointerAt = -1e9;
addEventListener("pointerup", () => (pointerAt = performance.now()), true);
for (const kind of ["click", "change"]) {
  addEventListener(kind, (event) => {
    if (performance.now() - pointerAt > 400 || $("help").open) return;
    if (event.target.closest?.("button:not(#upload), summary, a, input[type=range], input[type=radio]")) $("stage").focus({ preventScroll: true });
  });
}

setInterval(showNumbers, 250);
new ResizeObserver(fit).observe($("views"));
// Another screen or zoom changes how many screen pixels there are without resizing the stage.
addEventListener("resize", fit);
navigator.keyboard?.getLayoutMap?.().then((map) => {
  layout = map;
  if (!world) return;
  buildKeys();
  buildHelp();
}, () => {});
connect();
