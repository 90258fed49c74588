// Contrast, and the channels of the file: which are drawn, their colours, and a window for each.
// The choices hold for all images with the same channels, and survive a reload of the page.

import * as api from "./api.js";
import { Layer } from "./layers.js";
import { $, guarded, page, say, view } from "./state.js";
import { element } from "./table.js";

const USUAL = "0.5 99.8"; // percentiles
const setOf = (channels) => JSON.stringify(channels.map(({ name }) => name));
const keyOf = ({ channel }) => channel ?? "gray"; // names may be any, even "__proto__"
const PICTURE = setOf([{ name: "red" }, { name: "green" }, { name: "blue" }]);
const choices = JSON.parse(sessionStorage.getItem("channels") || "{}");

// What was chosen for images with the channels of the one that is open.
let choice = {};

function keep() {
  const { open } = page;
  for (const layer of open.layers) {
    const { visible, colour, byHand, type } = layer, key = keyOf(layer);
    if (open.problem || !type) continue;
    choice.layers[key] = { visible, colour, windows: { ...choice.layers[key]?.windows, [type]: byHand } };
  }
  sessionStorage.setItem("channels", JSON.stringify(choices));
}

// The gray plane and the channels of an image, with the pixels of those that are drawn; `fetch` gets the
// pixels of layers.  Channels that cannot be read are a `problem`, and the gray plane is drawn.
export async function layersOf(id, fetch) {
  const listed = await api.channels(id);
  const set = setOf(listed);
  const first = set === PICTURE ? "all" : String(Math.max(0, listed.findIndex(({ shown }) => shown)));
  const chosen = (choices[set] ??= { active: first, percentiles: USUAL, layers: {} });
  const layers = [new Layer({ visible: !listed.length })];
  listed.forEach(({ name, colour, shown }, channel) => layers.push(new Layer({ channel, name, colour, visible: shown })));
  const [plane, ...channels] = layers;
  for (const layer of layers) {
    const { visible, colour } = chosen.layers[keyOf(layer)] || layer;
    Object.assign(layer, { visible, colour });
  }
  const opened = { layers, choice: chosen, problem: "" };
  opened.fetch = async (...wanted) => {
    await fetch(wanted);
    for (const layer of wanted) layer.byHand = chosen.layers[keyOf(layer)]?.windows[layer.type] || null;
  };
  try {
    const wanted = plane.visible ? [plane] : channels.filter((one) => one.visible);
    if (wanted.length) await opened.fetch(...wanted);
  } catch (error) {
    if (plane.visible || !error.status) throw error;
    opened.problem = error.message;
    plane.visible = true;
    await opened.fetch(plane);
  }
  fitWindows(opened);
  return opened;
}

// --- windows ---

// The colours of a picture belong together: they have one window, usually all of 8 bits.
const isPicture = (layers) => setOf(layers.slice(1)) === PICTURE;

function automatic(layer, { layers, choice: { percentiles } }) {
  const [low, high] = percentiles.split(" ").map(Number);
  let family = [layer];
  if (isPicture(layers) && layer.channel !== null) {
    if (layer.type === "Uint8Array" && percentiles === USUAL) return [0, 255];
    family = layers.slice(1).filter((one) => one.sample);
  }
  const found = [
    Math.min(...family.map((one) => one.percentile(low))), Math.max(...family.map((one) => one.percentile(high))),
  ];
  return found[1] > found[0] ? found : layer.range;
}

function fitWindows(opened) {
  for (const layer of opened.layers) {
    if (layer.sample) layer.setWindow(...(layer.byHand || automatic(layer, opened)));
  }
}

// The layers that the sliders change.
function adjusted() {
  const [plane, ...channels] = page.open.layers;
  if (plane.visible) return [plane];
  const active = channels[choice.active] ? [channels[choice.active]] : channels;
  return active.filter((one) => one.sample);
}

function showWindow() {
  const layers = adjusted();
  for (const id of ["low", "high"]) $(id).disabled = $(`${id}-value`).disabled = !layers.length;
  if (!layers.length) return;
  const [least, most] = layers[0].channel !== null && isPicture(page.open.layers) && layers[0].type === "Uint8Array"
    ? [0, 255] : [Math.min(...layers.map(({ range }) => range[0])), Math.max(...layers.map(({ range }) => range[1]))];
  const span = most - least, step = layers[0].whole ? Math.max(1, Math.round(span / 1000)) : span / 1000;
  const values = { low: Math.min(...layers.map((one) => one.low)), high: Math.max(...layers.map((one) => one.high)) };
  const [one] = layers, gray = page.open.layers.length > 1 ? "the gray picture" : "";
  const name = layers.length > 1 ? "all channels" : one.channel === null ? gray : one.title;
  for (const [id, word] of [["low", "Black"], ["high", "White"]]) {
    const shown = Number(one.whole && span > 20 ? Math.round(values[id]) : values[id].toPrecision(4));
    Object.assign($(id), { min: least, max: most, step, value: values[id] });
    Object.assign($(`${id}-value`), { step: one.whole ? 1 : "any", value: shown });
    const label = name ? `${word} of ${name}` : word;
    $(id).setAttribute("aria-label", label);
    $(id).setAttribute("aria-valuetext", shown);
    $(`${id}-value`).setAttribute("aria-label", `${label}, exact`);
  }
  $("contrast").textContent = name && `Contrast of ${name}`;
}

function setWindow(moved, value) {
  if (!Number.isFinite(value)) return;
  for (const layer of adjusted()) {
    let { low, high } = layer;
    if (moved === "low") [low, high] = [value, Math.max(value, high)];
    else [low, high] = [Math.min(value, low), value];
    layer.byHand = [low, high];
    layer.setWindow(low, high);
  }
  changed();
}

// Automatic windows for the layers of the sliders, or for all.
export function autoContrast(all = false) {
  for (const layer of all ? page.open.layers : adjusted()) layer.byHand = null;
  fitWindows(page.open);
  changed();
}

function changed() {
  keep();
  view.repaint();
  showWindow();
}

// --- channels ---

// Draw or hide a layer; its pixels come when they are needed first.  Returns whether they could.
async function setVisible(layer, visible, quiet = false) {
  const { open } = page;
  if (visible && !layer.sample) {
    say(`Loading ${layer.title || "the gray picture"}`);
    const loaded = await guarded(async () => {
      await open.fetch(layer);
      return true;
    });
    if (page.open !== open) return false;
    if (!loaded) {
      drawList();
      return false;
    }
    fitWindows(open);
  }
  layer.visible = visible;
  if (!quiet) say(`${layer.channel === null ? "The gray picture" : layer.title} is ${visible ? "shown" : "hidden"}`);
  drawList();
  changed();
  return true;
}

export function toggleChannel(place) {
  const layer = page.open.layers[place];
  if (!layer) return;
  if (layer.channel !== null && page.open.layers[0].visible) setGray(false);
  setVisible(layer, !layer.visible);
}

// The gray plane, or channels.
export async function setGray(gray) {
  const { open } = page, [plane, ...channels] = open.layers;
  if (!channels.length) return;
  let failed = false; // the reason is on the screen, and stays there
  for (const one of gray ? [] : channels.filter(({ visible, sample }) => visible && !sample)) {
    if (one.visible) failed = !(await setVisible(one, true, failed)) || failed; // still, after others were fetched
    if (page.open !== open) return;
  }
  if (gray || channels.some((one) => one.sample)) await setVisible(plane, gray, failed);
  else drawList();
}

export const toggleGray = () => setGray(!page.open.layers[0].visible);

export function showChannels() {
  ({ choice } = page.open);
  $("channels").hidden = page.open.layers.length < 2;
  $("channels-note").textContent = page.open.problem && `The channels cannot be shown. ${page.open.problem}`;
  $("percentiles").value = choice.percentiles;
  drawList();
  showWindow();
}

function input(type, label, values = {}) {
  const made = element("input");
  made.setAttribute("aria-label", label);
  return Object.assign(made, { type, ...values });
}

function drawList() {
  const [plane, ...channels] = page.open.layers;
  const place = $("channel-list"), focused = place.contains(document.activeElement) && document.activeElement.dataset.is;
  $("gray").checked = plane.visible;
  place.replaceChildren(...channels.map((layer) => {
    const line = element("div"), { title, visible, colour, channel } = layer;
    const box = input("checkbox", `Show ${title}`, { checked: visible });
    box.addEventListener("change", () => setVisible(layer, box.checked));
    const swatch = input("color", `Colour of ${title}`, { value: colour });
    swatch.addEventListener("input", () => {
      layer.colour = swatch.value;
      changed();
    });
    line.append(box, swatch, contrastOf(String(channel), title));
    [box, swatch].forEach((one, k) => { one.dataset.is = `${channel} ${k}`; });
    return line;
  }), contrastOf("all", "all channels"));
  place.classList.toggle("off", plane.visible);
  if (focused) place.querySelector(`[data-is="${focused}"]`)?.focus();
}

// A name that gives the sliders to its channel.
function contrastOf(active, title) {
  const label = element("label");
  const radio = input("radio", `Contrast of ${title}`, { name: "contrast", checked: choice.active === active });
  radio.dataset.is = active;
  radio.addEventListener("change", () => {
    choice.active = active;
    const layer = page.open.layers[Number(active) + 1];
    if (layer && !layer.sample) setVisible(layer, true);
    keep();
    showWindow();
  });
  label.append(radio, title);
  return label;
}

for (const id of ["low", "high"]) {
  $(id).addEventListener("input", () => setWindow(id, Number($(id).value)));
  $(`${id}-value`).addEventListener("change", () => setWindow(id, $(`${id}-value`).valueAsNumber));
}
$("auto").addEventListener("click", () => autoContrast());
$("gray").addEventListener("change", () => setGray($("gray").checked));
$("percentiles").addEventListener("change", () => {
  choice.percentiles = $("percentiles").value;
  autoContrast();
});
