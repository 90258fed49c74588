// The page: images on the left, the picture in the middle, what was found on the right.

import * as api from "./api.js";
import { Edits, numbersOf } from "./edits.js";
import { Table, element } from "./table.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const LARGEST = 64e6; // pixels that the page shows; the results of larger images can be downloaded
const KINDS = {
  tif: "Labels (TIFF)", png: "Labels (PNG)", csv: "Table (CSV)", geojson: "Outlines (GeoJSON)",
  roi: "ImageJ ROIs", coco: "COCO", overlay: "Picture", npy: "Labels (npy)", zip: "All in one (zip)",
};
const KEYS = [
  ["Wheel, + −", "zoom"], ["Drag, ← ↑ → ↓", "move the picture"], ["0", "show the whole picture"],
  ["W", "automatic contrast"], ["Z", "outlines, filled, hidden"], ["Space (held)", "hide the labels"],
  ["Click", "select a cell"], ["Shift + click", "select one more"], ["Esc", "select nothing"],
  ["Q, Shift + Q", "next, previous doubtful cell"], ["Delete, Ctrl + click", "remove cells"],
  ["J, Alt + click", "merge two cells"], ["Ctrl + Z, Ctrl + Y", "undo, redo"],
  ["A, D", "previous, next image"], ["?", "show or hide this list"],
];

const jobs = new Map(); // id → job, newest last
let open = null; // what is shown: { id, height, width, labels, numbers, revision, edits, thresholds }
let doubtful = -1;

const view = new View($("canvas"), { onClick: clicked, onHover: hovered });
const table = new Table($("table"), (row) => select([open.numbers[row]], true));

function say(text) {
  $("status").textContent = text;
}

async function guarded(work) {
  try {
    return await work();
  } catch (error) {
    if (error.status === 401) $("token-form").hidden = false;
    say(error.message);
    if (!(error instanceof api.Problem)) console.error(error);
  }
  return undefined;
}

// --- images ---

async function add(files) {
  for (const file of files) {
    for (;;) {
      try {
        say(`Uploading ${file.name}`);
        const job = await api.upload(file);
        noteJob(job);
        watch(job.id, true);
        say("");
        break;
      } catch (error) {
        if (error.status !== 429) {
          await guarded(() => { throw error; });
          break;
        }
        say(`The queue is full; ${file.name} waits`);
        await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter || 5)));
      }
    }
  }
}

// Follow a job until it has ended; a broken connection is tried again.
async function watch(id, show) {
  for (let pause = 1000; ; pause = Math.min(2 * pause, 30000)) {
    try {
      await api.follow(id, noteJob);
    } catch (error) {
      if (error.status) return;
    }
    const job = jobs.get(id);
    if (["done", "failed", "cancelled", "deleted", "expired"].includes(job.state)) {
      if (job.state === "done" && show && !asked) openJob(id);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

function noteJob(job) {
  jobs.set(job.id, job);
  drawJobs();
}

function drawJobs() {
  const list = $("job-list");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const lines = [];
  for (const job of [...jobs.values()].reverse()) {
    if (["deleted", "cancelled", "expired"].includes(job.state)) continue;
    const line = element("li");
    const button = line.appendChild(element("button"));
    button.type = "button";
    button.dataset.id = job.id;
    if (open?.id === job.id) button.setAttribute("aria-current", "true");
    const name = button.appendChild(element("span", job.name));
    name.className = "name";
    name.title = job.name;
    const state = button.appendChild(element("span", stateOf(job)));
    state.className = job.state === "failed" ? "quiet failed" : "quiet";
    if (job.state === "running" || job.state === "queued") {
      const bar = button.appendChild(element("progress"));
      bar.setAttribute("aria-label", `Progress of ${job.name}`);
      if (job.windows_total) {
        bar.max = job.windows_total;
        bar.value = job.windows_done;
      } else if (job.state === "queued") bar.value = 0;
    }
    button.addEventListener("click", () => (job.state === "done" ? openJob(job.id) : drop(job)));
    lines.push(line);
  }
  list.replaceChildren(...lines);
  if (focused) list.querySelector(`[data-id="${focused}"]`)?.focus();
}

function stateOf(job) {
  if (job.state === "done") return `${job.summary.num_cells} cells`;
  if (job.state === "failed") return job.error;
  if (job.state === "queued") return job.waiting_before ? `${job.waiting_before} before it · click cancels` : "waits · click cancels";
  return job.windows_total ? `${Math.round((100 * job.windows_done) / job.windows_total)} % · click cancels` : "starts";
}

async function drop(job) {
  await guarded(async () => {
    noteJob(await api.remove(job.id));
  });
}

let asked = null; // the image that was asked for last

async function openJob(id) {
  asked = id;
  await guarded(async () => {
    await saveNow();
    say("Loading");
    const job = jobs.get(id);
    const { image_height_px: height, image_width_px: width } = job.summary;
    if (height * width > LARGEST) {
      open = null;
      view.close();
      say(`${job.name} has ${height} × ${width} pixels, too many to be shown here; its results can be downloaded`);
      open = { id };
      showPanel(job);
      $("downloads").closest("details").open = true;
      return;
    }
    const [image, labels, revision, cells] = await Promise.all(
      [api.image(id), api.labels(id), api.revision(id), api.cells(id)],
    );
    if (asked !== id) return;
    open = {
      id, height, width, labels: labels.data, revision: revision.revision,
      edits: new Edits(), thresholds: thresholdsOf(revision),
    };
    doubtful = -1;
    view.show(image, open.labels);
    $("empty").hidden = true;
    $("tools").hidden = false;
    showPanel(job);
    showThresholds(open.thresholds);
    showCells(cells);
    showWindow();
    showEdits();
    drawJobs();
    say("");
  });
}

function thresholdsOf({ peak_threshold, fill_threshold, min_area_px }) {
  return { peak_threshold, fill_threshold, min_area_px };
}

function showPanel(job) {
  $("panel").hidden = false;
  $("title").textContent = job.name;
  $("notes").hidden = !job.summary.warnings;
  $("notes").textContent = job.summary.warnings || "";
  $("count").textContent = `${job.summary.num_cells} cells`;
  select([]);
}

function showCells(cells) {
  if (cells) {
    open.numbers = numbersOf(open.labels);
    table.set(cells.columns);
  }
  const scores = table.columns.score || [];
  const low = scores.filter((score) => score < 0.5).length;
  $("count").replaceChildren(
    `${open.numbers.length} cells `,
    element("small", low ? `${low} of them with a score below 0.5` : ""),
  );
  view.canvas.setAttribute("aria-label", `${jobs.get(open.id).name}: ${open.numbers.length} cells`);
  const job = jobs.get(open.id);
  job.summary.num_cells = open.numbers.length;
  drawJobs();
  showSelection();
}

// --- contrast and labels ---

function showWindow() {
  const [least, most] = view.range;
  for (const [id, value] of [["low", view.low], ["high", view.high]]) {
    $(id).value = Math.round((1000 * (value - least)) / (most - least));
    $(`${id}-value`).textContent = most - least > 20 ? Math.round(value) : value.toPrecision(3);
  }
}

function setWindow(moved) {
  const [least, most] = view.range;
  let [low, high] = ["low", "high"].map((id) => least + ($(id).value / 1000) * (most - least));
  if (high <= low) [low, high] = moved === "low" ? [low, low] : [high, high];
  view.setWindow(low, high);
  showWindow();
}

function setStyle(style) {
  view.style = $("style").value = style;
  view.paintLabels();
}

// --- selection ---

function clicked(at, event) {
  if (!at || !open) return;
  const { label } = at;
  if (event.altKey && label && view.selected.size) {
    merge([...view.selected, label]);
  } else if ((event.ctrlKey || event.metaKey) && label) {
    remove([label]);
  } else if (event.shiftKey && label) {
    const chosen = new Set(view.selected);
    if (!chosen.delete(label)) chosen.add(label);
    select([...chosen]);
  } else select(label ? [label] : []);
}

function hovered(at) {
  if (!at) {
    $("pixel").textContent = "";
    return;
  }
  const { x, y, label } = at;
  const { data, shape } = view.image;
  const place = y * shape[1] + x;
  const value = shape.length === 3 ? [...data.slice(3 * place, 3 * place + 3)].join(" ") : Number(data[place].toPrecision(6));
  $("pixel").textContent = `row ${y}, column ${x}: ${value}${label ? `, cell ${rowOf(label) + 1}` : ""}`;
}

// The row of the table of a label, -1 if there is none.
function rowOf(label) {
  return open?.numbers ? open.numbers.indexOf(label) : -1;
}

function select(labels, show = false) {
  view.selected = new Set(labels);
  if (open?.labels) view.paintLabels();
  if (show && labels.length) {
    const row = rowOf(labels[0]);
    const { centroid_row: y, centroid_col: x } = table.columns;
    if (row >= 0 && x) view.center(x[row] + 0.5, y[row] + 0.5, 3);
  }
  showSelection();
}

function showSelection() {
  const rows = [...view.selected].map(rowOf).filter((row) => row >= 0);
  $("remove").disabled = !rows.length;
  $("merge").disabled = rows.length < 2;
  table.mark(rows);
  const place = $("selection");
  if (!rows.length) place.replaceChildren();
  else if (rows.length > 1) place.replaceChildren(element("p", `${rows.length} cells are selected`));
  else if (rows[0] < table.length) place.replaceChildren(table.list(rows[0]));
}

function nextDoubtful(step) {
  const scores = table.columns.score;
  if (!scores?.length) return;
  const order = [...scores.keys()].sort((a, b) => scores[a] - scores[b] || a - b);
  doubtful = (doubtful + step + order.length) % order.length;
  const row = order[doubtful];
  select([open.numbers[row]], true);
  say(`Cell ${row + 1}, score ${scores[row].toFixed(2)}: ${doubtful + 1} of ${order.length} by doubt`);
}

// --- changes ---

function remove(labels) {
  const gone = new Set(labels);
  edited(open.edits.change(open.labels, (label) => (gone.has(label) ? 0 : label)));
  select([]);
}

function merge(labels) {
  const [first, ...others] = new Set(labels);
  if (!others.length) return;
  const gone = new Set(others);
  edited(open.edits.change(open.labels, (label) => (gone.has(label) ? first : label)));
  select([first]);
}

function edited() {
  open.numbers = numbersOf(open.labels);
  view.paintLabels();
  showEdits();
  saveSoon();
}

async function step(direction) {
  wanted = null;
  await last.catch(() => {}); // a relabel that is on its way is the step to undo
  const entry = open?.edits?.[direction](open.labels);
  if (!entry) return;
  const thresholds = entry.note?.[direction === "undo" ? "before" : "after"];
  if (thresholds) showThresholds(open.thresholds = thresholds);
  select([]);
  edited();
}

function showEdits() {
  $("undo").disabled = !open.edits.done.length;
  $("redo").disabled = !open.edits.undone.length;
}

let saving = null; // the changes of an image that are on their way to the service

function saveSoon() {
  clearTimeout(saving?.timer);
  saving = { ...open, shown: open, timer: setTimeout(saveNow, 400) };
}

async function saveNow() {
  if (!saving) return;
  const { id, labels, height, width, shown, timer } = saving;
  clearTimeout(timer);
  saving = null;
  await inTurn(async () => {
    const answer = await api.replaceLabels(id, labels, height, width, shown.revision);
    shown.revision = answer.revision;
    if (open === shown && !saving) showCells(await api.cells(id));
  }).catch((error) => {
    say(error.status === 409 ? "Somebody else has changed these labels: open the image again to see them" : error.message);
  });
}

// Requests that change labels follow each other.
let last = Promise.resolve();
function inTurn(work) {
  last = last.catch(() => {}).then(work);
  return last;
}

function showThresholds({ peak_threshold, fill_threshold, min_area_px }) {
  for (const [id, value] of [["peak", peak_threshold], ["fill", fill_threshold], ["area", min_area_px]]) {
    $(id).value = value;
    $(`${id}-value`).textContent = id === "area" ? `${value} px` : Number(value).toFixed(2);
  }
}

let wanted = null, relabelling = false;

function thresholdMoved(moved) {
  let [peak, fill] = [Number($("peak").value), Number($("fill").value)];
  if (fill >= peak) [peak, fill] = moved === "peak" ? [peak, peak - 0.01] : [fill + 0.01, fill];
  wanted = { peak_threshold: peak, fill_threshold: Math.max(0, fill), min_area_px: Number($("area").value) };
  showThresholds(wanted);
  relabelSoon();
}

// One relabel at a time; of values that come meanwhile, the last one counts.
async function relabelSoon() {
  if (relabelling || !open?.labels) return;
  relabelling = true;
  const shown = open;
  while (wanted && open === shown) {
    const thresholds = wanted;
    wanted = null;
    await guarded(() => inTurn(async () => {
      const answer = await api.relabel(shown.id, thresholds);
      const { data } = await api.labels(shown.id);
      shown.revision = answer.revision;
      if (open !== shown) return;
      const note = { before: shown.thresholds, after: thresholds, time: Date.now() };
      const previous = shown.edits.done.at(-1)?.note;
      if (previous && note.time - previous.time < 1500) { // one movement of a slider is one step
        shown.edits.undo(shown.labels);
        note.before = previous.before;
      }
      shown.edits.change(shown.labels, (_, i) => data[i], note);
      shown.thresholds = thresholds;
      shown.numbers = numbersOf(shown.labels);
      view.selected.clear();
      view.paintLabels();
      showEdits();
      if (!wanted) showCells(await api.cells(shown.id));
    }));
  }
  relabelling = false;
}

// --- wiring ---

function neighbour(step) {
  const ids = [...jobs.values()].reverse().filter((job) => job.state === "done").map((job) => job.id);
  const place = ids.indexOf(open?.id);
  const next = ids[place + step];
  if (next) openJob(next);
}

const ACTIONS = {
  "+": () => view.zoom(1.25), "=": () => view.zoom(1.25), "-": () => view.zoom(0.8), 0: () => view.fit(),
  ArrowLeft: () => view.pan(-60, 0), ArrowRight: () => view.pan(60, 0),
  ArrowUp: () => view.pan(0, -60), ArrowDown: () => view.pan(0, 60),
  w: () => { view.auto(); showWindow(); },
  z: () => setStyle({ outline: "fill", fill: "none", none: "outline" }[view.style]),
  q: () => nextDoubtful(1), Q: () => nextDoubtful(-1),
  Delete: () => view.selected.size && remove([...view.selected]),
  Backspace: () => view.selected.size && remove([...view.selected]),
  j: () => merge([...view.selected]), Escape: () => select([]),
  a: () => neighbour(-1), d: () => neighbour(1),
};

function toggleHelp() {
  $("help").hidden = !$("help").hidden;
  $("help-button").setAttribute("aria-expanded", String(!$("help").hidden));
}

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (target.matches("input[type=password], select")) return;
  if (target.matches("input[type=range]") && /^(Arrow|Page|Home|End)/.test(key)) return;
  if (key === "?") return toggleHelp();
  if (!open?.labels) return;
  if ((event.ctrlKey || event.metaKey) && /^[zy]$/i.test(key)) {
    event.preventDefault();
    step(key.toLowerCase() === "y" || event.shiftKey ? "redo" : "undo");
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === " " && !target.matches("button, summary, input, [type=checkbox]")) {
    event.preventDefault();
    view.hidden = true;
    view.draw();
    return;
  }
  const scrolls = /^Arrow/.test(key) && target !== view.canvas && target !== document.body;
  const action = ACTIONS[key] || ACTIONS[key.length === 1 && !event.shiftKey ? key.toLowerCase() : key];
  if (!action || scrolls) return;
  event.preventDefault();
  action();
});
document.addEventListener("keyup", (event) => {
  if (event.key === " " && view.hidden) {
    view.hidden = false;
    view.draw();
  }
});

for (const id of ["low", "high"]) $(id).addEventListener("input", () => setWindow(id));
for (const id of ["peak", "fill", "area"]) $(id).addEventListener("input", () => thresholdMoved(id));
$("opacity").addEventListener("input", () => {
  view.opacity = $("opacity").value / 100;
  $("opacity-value").textContent = `${$("opacity").value} %`;
  view.draw();
});
$("opacity").dispatchEvent(new Event("input"));
$("style").addEventListener("change", () => setStyle($("style").value));
$("auto").addEventListener("click", ACTIONS.w);
$("undo").addEventListener("click", () => step("undo"));
$("redo").addEventListener("click", () => step("redo"));
$("doubtful").addEventListener("click", ACTIONS.q);
$("remove").addEventListener("click", ACTIONS.Delete);
$("merge").addEventListener("click", ACTIONS.j);
$("zoom-in").addEventListener("click", ACTIONS["+"]);
$("zoom-out").addEventListener("click", ACTIONS["-"]);
$("zoom-fit").addEventListener("click", ACTIONS[0]);
$("help-button").addEventListener("click", toggleHelp);
$("all-columns").addEventListener("change", () => {
  table.all = $("all-columns").checked;
  table.draw();
});
$("files").addEventListener("change", () => {
  add([...$("files").files]);
  $("files").value = "";
});
$("delete-job").addEventListener("click", () => guarded(async () => {
  const { id } = open;
  saving = null;
  noteJob(await api.remove(id));
  open = asked = null;
  view.close();
  $("panel").hidden = $("tools").hidden = true;
  $("empty").hidden = false;
}));
for (const [kind, text] of Object.entries(KINDS)) {
  const button = $("downloads").appendChild(element("button", text));
  button.type = "button";
  button.addEventListener("click", () => guarded(async () => {
    await saveNow();
    await last.catch(() => {});
    await api.download(open.id, kind);
  }));
}
for (const [keys, text] of KEYS) {
  const pair = $("keys").appendChild(element("div"));
  pair.append(element("dt"), element("dd", text));
  pair.firstChild.append(element("kbd", keys));
}

let entered = 0;
document.addEventListener("dragenter", (event) => {
  event.preventDefault();
  entered += 1;
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => {
  entered -= 1;
  if (!entered) document.body.classList.remove("dropping");
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  entered = 0;
  document.body.classList.remove("dropping");
  add([...event.dataTransfer.files]);
});
addEventListener("beforeunload", (event) => {
  if (saving) event.preventDefault();
  saveNow();
});

async function start() {
  await guarded(async () => {
    const [model] = await api.models();
    $("model").textContent = `${model.name} on ${model.device}`;
    for (const job of (await api.jobs()).reverse()) {
      noteJob(job);
      if (job.state === "queued" || job.state === "running") watch(job.id, false);
    }
    if (!asked) neighbour(1); // the newest one
    $("token-form").hidden = true;
    say("");
  });
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setToken($("token").value);
  start();
});
start();
