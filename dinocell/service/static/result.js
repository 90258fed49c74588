// The image that is open: its picture, selection, measurements, thresholds, downloads.

import * as api from "./api.js";
import { layersOf, showChannels } from "./channels.js";
import { drawJobs, noteJob } from "./jobs.js";
import { showLearning } from "./learn.js";
import { $, guarded, inTurn, page, plot, say, table, view, worded } from "./state.js";
import { cellsOf, element } from "./table.js";
import { Tiles } from "./tiles.js";

const TILED = 32e6; // pixels; larger images come in tiles
const KINDS = { // all of KINDS in stored.py
  tif: "Labels (TIFF)", png: "Labels (PNG)", "ome-tiff": "Labels (OME-TIFF)",
  "ome-zarr": "Image and labels (OME-Zarr)", ctc: "Cell Tracking Challenge", csv: "Table (CSV)",
  parquet: "Table (Parquet)", h5ad: "Table (AnnData)", geojson: "Outlines (GeoJSON)", roi: "ImageJ ROIs", coco: "COCO",
  cellpose: "Cellpose (_seg.npy)", overlay: "Picture", npy: "Labels (npy)", zip: "All in one (zip)",
};
let doubtful = null; // [score, number] of the doubtful cell that was shown last

export async function openJob(id) {
  page.asked = id;
  sessionStorage.setItem("open", id); // a reload opens it again
  page.left?.abort();
  const left = (page.left = new AbortController());
  await guarded(async () => {
    say("Loading");
    const job = page.jobs.get(id);
    const { image_height_px: height, image_width_px: width } = job.summary;
    if (height * width > TILED) {
      await openTiles(id, job, height, width);
      return;
    }
    const fetch = async (layers) => {
      // One after the other: others who use the server wait less.
      for (const layer of layers) {
        layer.pixels = (await api.image(id, layer.channel, left.signal)).data;
        layer.learn(layer.pixels);
      }
    };
    const [opened, state] = await Promise.all([layersOf(id, fetch), loaded(id)]);
    if (page.asked !== id) return;
    show({ id, height, width, left, ...opened, ...state }, job);
    showState();
    showLearning();
    say("");
  });
}

// The picture first; measurements follow when the service has them.
async function openTiles(id, job, height, width) {
  const tiles = new Tiles(id, height, width, () => view.shown(), () => view.draw());
  const opened = await layersOf(id, async (layers) => {
    (await tiles.whole(layers)).forEach((pixels, k) => layers[k].learn(pixels));
  });
  if (page.asked !== id) return;
  show({ id, height, width, tiles, touched: new Set(), ...opened }, job);
  await nextFrame();
  if (page.asked !== id) return;
  tiles.fetchLabels(tiles.top, 0, 0).catch((error) => console.error(error));
  say("The cells of a large image are being measured; you can look at it meanwhile");
  const cells = await api.cells(id), state = stateOf(await api.revision(id));
  await tiles.upTo(state.revision); // somebody may correct the image meanwhile
  if (page.asked !== id) return;
  Object.assign(page.open, { cells, numbers: cells.numbers }, state);
  view.setLabels(null, page.open.touched);
  showState();
  if (cells.revision !== state.revision) cellsSoon();
  showLearning();
  say("");
}

// After the next frame, or soon where none is drawn, as in a hidden page.
function nextFrame() {
  return new Promise((done) => {
    requestAnimationFrame(() => setTimeout(done));
    setTimeout(done, 500);
  });
}

function show(opened, job) {
  page.open?.left?.abort();
  page.left = null; // the picture that is shown may fetch more channels, also while another one is opened
  page.open = opened;
  doubtful = wanted = null;
  endMovement();
  askNoMore();
  view.show(page.open);
  $("empty").hidden = true;
  $("tools").hidden = false;
  showPanel(job);
  showChannels();
  drawJobs();
}

// Labels, revision and measurements that belong together, although somebody may change them meanwhile.
async function loaded(id) {
  for (;;) {
    const [labels, revision, cells] = await Promise.all([api.labels(id), api.revision(id), api.cells(id)]);
    const after = await api.revision(id);
    if (cells.revision !== revision.revision || after.revision !== revision.revision) continue;
    return { labels: labels.data, cells, numbers: cells.numbers, ...stateOf(revision) };
  }
}

// Load the labels of the open image again, because somebody else has changed them.
export async function reload() {
  const shown = page.open;
  const state = shown.tiles ? stateOf(await api.revision(shown.id)) : await loaded(shown.id);
  await shown.tiles?.upTo(state.revision); // before a correction may name this revision
  Object.assign(shown, state);
  if (page.open !== shown) return;
  view.setLabels(shown.labels, shown.touched);
  select([]);
  showState();
  if (shown.tiles) cellsSoon();
}

function stateOf(change) {
  const { revision, undoable, redoable, num_cells: count } = change;
  const { peak_threshold, fill_threshold, min_area_px } = change;
  return {
    revision, undoable, redoable, count, touched: new Set(change.touched),
    thresholds: { peak_threshold, fill_threshold, min_area_px },
  };
}

// Take over the pixels and the revision of a change that the service has made; returns the new numbers.
export async function applyChange(shown, change) {
  if (shown.tiles) return applyToTiles(shown, change);
  const pixels = await api.pixelsOf(change);
  const { row, column, height, width } = change;
  const before = new Set(), after = new Set();
  for (let y = 0; y < height; y++) {
    const start = (row + y) * shown.width + column;
    for (let x = 0; x < width; x++) {
      const label = pixels[y * width + x];
      if (shown.labels[start + x] === label) continue;
      before.add(shown.labels[start + x]);
      after.add(label);
      shown.labels[start + x] = label;
    }
  }
  after.delete(0);
  Object.assign(shown, stateOf(change));
  if (page.open !== shown) return [];
  view.setLabels(shown.labels, shown.touched);
  showState();
  cellsSoon();
  return [...after];
}

async function applyToTiles(shown, change) {
  const before = new Set(shown.numbers);
  Object.assign(shown, stateOf(change));
  await shown.tiles.refresh(change);
  if (page.open !== shown) return [];
  view.setLabels(null, shown.touched);
  showState();
  cellsSoon();
  return change.touched.filter((number) => !before.has(number)).slice(0, 2);
}

let timer = 0;
function cellsSoon() {
  clearTimeout(timer);
  const shown = page.open;
  timer = setTimeout(() => guarded(async () => {
    const cells = await api.cells(shown.id);
    if (page.open !== shown || cells.revision !== shown.revision) return;
    Object.assign(shown, { cells, numbers: cells.numbers });
    showState();
    showLearning();
  }), 250);
}

function showPanel(job) {
  $("panel").hidden = false;
  $("title").textContent = job.name;
  const chosen = ["channels", "page", "z", "time", "scene", "diameter_px", "pixel_size_um", "allow_mask"].map((name) => [name, [job.options[name] ?? []].flat()]);
  const parts = chosen.filter(([, given]) => given.length).map(([name, given]) => worded(name, given.join(", ")));
  $("segmented-as").textContent = parts.join(" · ");
  $("notes").hidden = !job.summary.warnings;
  $("notes").textContent = job.summary.warnings || "";
  $("count").textContent = cellsOf(job.summary.num_cells);
  select([]);
}

// Everything that depends on the labels of the open image.
function showState() {
  const { open, jobs } = page;
  showThresholds(open.thresholds);
  $("undo").disabled = !open.undoable;
  $("redo").disabled = !open.redoable;
  if (table.columns !== open.cells.columns) {
    table.set(open.cells.columns);
    plot.set(open.cells.columns);
    filter();
  }
  const low = (table.columns.score || []).filter((score) => score !== null && score < 0.5).length;
  const notes = [low && `${low} with a score below 0.5`, open.touched.size && `${open.touched.size} corrected`];
  $("count").replaceChildren(`${cellsOf(open.count)} `, element("small", notes.filter(Boolean).join(" · ")));
  const job = jobs.get(open.id);
  view.canvas.setAttribute("aria-label", `${job.name}: ${cellsOf(open.count)}`);
  if (job.summary.num_cells !== open.count) {
    job.summary.num_cells = open.count;
    drawJobs();
  }
  showSelection();
}

// --- labels ---

export function setStyle(style) {
  view.style = $("style").value = style;
  view.paintLabels();
}

// --- selection ---

export function hovered(at) {
  if (!at) {
    $("pixel").textContent = "";
    return;
  }
  const { x, y, label } = at;
  const values = view.valuesIn(x, y).map(([layer, value]) => `${layer.title} ${Number(value.toPrecision(6))}`.trim());
  $("pixel").textContent = `row ${y}, column ${x}: ${values.join(", ")}${label ? `, cell ${rowOf(label) + 1}` : ""}`;
}

// The row of the table of a label, -1 if there is none.
function rowOf(label) {
  return page.open?.numbers ? page.open.numbers.indexOf(label) : -1;
}

export function select(labels, show = false) {
  view.selected = new Set(labels);
  if (page.open) view.paintLabels();
  if (show && labels.length) {
    const row = rowOf(labels[0]);
    const { centroid_row: y, centroid_col: x } = table.columns;
    if (row >= 0 && x) view.center(x[row] + 0.5, y[row] + 0.5, 3);
  }
  showSelection();
}

function showSelection() {
  const rows = [...view.selected].map(rowOf).filter((row) => row >= 0);
  $("remove").disabled = !view.selected.size;
  $("merge").disabled = view.selected.size < 2;
  table.mark(rows);
  plot.mark(rows);
  const place = $("selection");
  if (!rows.length) place.replaceChildren();
  else if (rows.length > 1) place.replaceChildren(element("p", `${rows.length} cells are selected`));
  else if (rows[0] < table.length) place.replaceChildren(table.list(rows[0]));
}

export function nextDoubtful(step) {
  const scores = table.columns.score || [], { numbers } = page.open;
  if (!numbers) return;
  const order = [...scores.keys()].filter((row) => scores[row] !== null); // a corrected cell has none
  if (!order.length) {
    say("No cell has a score");
    return;
  }
  const apart = (a, b) => a[0] - b[0] || a[1] - b[1];
  const rank = (row) => [scores[row], numbers[row]];
  order.sort((a, b) => apart(rank(a), rank(b)));
  // No position in the list is kept, because cells leave it.
  let place = step > 0 ? 0 : order.length - 1;
  if (doubtful) {
    const next = order[step > 0 ? "findIndex" : "findLastIndex"]((row) => step * apart(rank(row), doubtful) > 0);
    if (next >= 0) place = next;
  }
  const row = order[place];
  doubtful = rank(row);
  select([numbers[row]], true);
  say(`Cell ${row + 1}, score ${scores[row].toFixed(2)}: ${place + 1} of ${order.length} by doubt`);
}

// --- thresholds ---

function showThresholds({ peak_threshold, fill_threshold, min_area_px }) {
  if (wanted) return; // the slider is ahead
  for (const [id, value] of [["peak", peak_threshold], ["fill", fill_threshold], ["area", min_area_px]]) {
    $(id).value = value;
    $(`${id}-value`).textContent = id === "area" ? `${value} px²` : Number(value).toFixed(2);
  }
}

let wanted = null, relabelling = false, relabelled = 0;

function thresholdMoved(moved) {
  let [peak, fill] = [Number($("peak").value), Number($("fill").value)];
  if (fill >= peak) [peak, fill] = moved === "peak" ? [peak, peak - 0.01] : [fill + 0.01, fill];
  const thresholds = { peak_threshold: peak, fill_threshold: Math.max(0, fill), min_area_px: Number($("area").value) };
  wanted = null;
  showThresholds(thresholds);
  wanted = thresholds;
  relabelSoon();
}

// One relabel at a time; of values that come meanwhile, the last one counts.  One movement is one step.
async function relabelSoon() {
  if (relabelling || page.open?.revision === undefined) return;
  relabelling = true;
  const shown = page.open;
  while (wanted && page.open === shown) {
    const thresholds = wanted;
    wanted = null;
    await guarded(() => inTurn(async () => {
      const amend = Date.now() - relabelled < 1500;
      const change = await api.relabel(shown.id, thresholds, shown.revision, amend, !shown.tiles);
      relabelled = Date.now();
      view.selected.clear();
      await applyChange(shown, change);
    }).catch(async (error) => {
      if (error.status !== 409) throw error;
      endMovement(); // the change of somebody else is not part of it
      await reload();
      if (page.open === shown) wanted ||= thresholds;
      say("Somebody else has changed these labels. The thresholds are applied to theirs");
    }));
  }
  relabelling = false;
  if (page.open?.revision === undefined) return;
  if (wanted) relabelSoon(); // moved in an image that was opened meanwhile
  else showThresholds(page.open.thresholds); // those of the labels, if the service has refused others
}

// The next movement of a slider is a step of its own.
export function endMovement() {
  relabelled = 0;
}

// Formats that the service cannot write, each with the reason.
export function greyOut(missing) {
  for (const button of $("downloads").children) {
    button.disabled = button.value in missing;
    button.title = missing[button.value] || "";
  }
}

// --- wiring ---

// Show the rows that the filter asks for.
function filter() {
  const wrong = table.filter($("filter").value);
  $("filter").setAttribute("aria-invalid", String(Boolean(wrong)));
  $("filter-note").textContent = wrong || (table.conditions.length ? `${table.order().length} of ${table.length} cells` : "");
}

const selectRows = (rows) => page.open.numbers && select(rows.map((row) => page.open.numbers[row]));
plot.onBrush = selectRows;
$("filter").addEventListener("input", filter);
$("filter-select").addEventListener("click", () => selectRows(table.order()));
table.onPick = (row) => page.open.numbers && select([page.open.numbers[row]], true);
for (const id of ["peak", "fill", "area"]) $(id).addEventListener("input", () => thresholdMoved(id));
$("opacity").addEventListener("input", () => {
  view.opacity = $("opacity").value / 100;
  $("opacity-value").textContent = `${$("opacity").value} %`;
  view.draw();
});
$("opacity").dispatchEvent(new Event("input"));
$("style").addEventListener("change", () => setStyle($("style").value));
$("doubtful").addEventListener("click", () => nextDoubtful(1));
$("all-columns").addEventListener("change", () => {
  table.all = $("all-columns").checked;
  table.draw();
});

// The first press asks, the second one deletes; the second half of a double click does not count.
const DELETES = $("delete-job").textContent;
let asking = 0;
function askNoMore() {
  clearTimeout(asking);
  asking = 0;
  $("delete-job").textContent = DELETES;
}
$("delete-job").addEventListener("blur", askNoMore);
$("delete-job").addEventListener("click", (event) => guarded(async () => {
  if (event.detail > 1) return;
  if (!asking) {
    $("delete-job").textContent = `Press again to delete ${cellsOf(page.open.count)} and their corrections`;
    asking = setTimeout(askNoMore, 6000);
    return;
  }
  askNoMore();
  noteJob(await api.remove(page.open.id));
  page.open = page.asked = null;
  view.close();
  $("panel").hidden = $("tools").hidden = true;
  $("empty").hidden = false;
}));
for (const [kind, text] of Object.entries(KINDS)) {
  const button = $("downloads").appendChild(element("button", text));
  Object.assign(button, { type: "button", value: kind });
  button.addEventListener("click", () => guarded(() => inTurn(() => api.download(page.open.id, kind))));
}
