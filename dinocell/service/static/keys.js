// Every key of the page, and the list of them.

import { autoContrast, toggleChannel, toggleGray } from "./channels.js";
import { correct, grow, merge, remove, setRadius, setTool, toggleTool } from "./corrections.js";
import { neighbour } from "./jobs.js";
import { nextDoubtful, select, setStyle } from "./result.js";
import { $, page, view } from "./state.js";
import { element } from "./table.js";

const KEYS = [
  ["Click, Enter", "select the cell there, or in the middle"], ["Shift + click", "select one more"],
  ["R, Shift + drag", "select the cells in a rectangle"], ["Esc", "select nothing, end a tool; close this list"],
  ["Q, Shift + Q", "next, previous doubtful cell"], ["Delete, Ctrl + click", "remove cells"],
  ["J, Alt + click", "merge cells"], ["S, then line or 2 clicks", "split a cell"],
  ["S, S", "split the selected cell by itself"], ["N, double click", "find a missed cell there"],
  ["B", "brush: a new cell, or, from the selected one on, more of it"], ["E", "eraser"], ["[ ]", "smaller, larger brush"],
  ["Ctrl + Z, Ctrl + Y", "undo, redo"], ["Space (held)", "hide the labels"],
  ["Z", "outlines, filled, hidden"], ["W, Shift + W", "automatic contrast, of all channels"],
  ["1 … 9", "show or hide a channel"], ["G", "gray picture of the network, or channels"], ["Wheel, + −", "zoom"],
  ["Drag, Shift + ← ↑ → ↓", "move the picture"], ["0", "show the whole picture"],
  ["← →, A, D", "previous, next image"], ["?", "show or hide this list"],
];

const chosen = () => [...view.selected];
const ACTIONS = {
  "+": () => view.zoom(1.25), "=": () => view.zoom(1.25), "-": () => view.zoom(0.8), 0: () => view.fit(),
  ArrowLeft: () => neighbour(-1), ArrowRight: () => neighbour(1),
  ArrowUp: () => view.pan(0, -60), ArrowDown: () => view.pan(0, 60),
  w: () => autoContrast(), W: () => autoContrast(true), g: toggleGray,
  z: () => setStyle({ outline: "fill", fill: "none", none: "outline" }[view.style]),
  q: () => nextDoubtful(1), Q: () => nextDoubtful(-1),
  Delete: () => remove(chosen()), Backspace: () => remove(chosen()), j: () => merge(chosen()),
  s: () => toggleTool("split"), n: () => grow(), b: () => toggleTool("paint"), e: () => toggleTool("erase"),
  r: () => toggleTool("box"), "[": () => setRadius(view.radius - 1), "]": () => setRadius(view.radius + 1),
  a: () => neighbour(-1), d: () => neighbour(1),
  Escape: () => {
    setTool(null);
    select([]);
  },
};
for (let place = 1; place <= 9; place++) ACTIONS[place] = () => toggleChannel(place);
const PANS = { ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] };

export function toggleHelp() {
  $("help").hidden = !$("help").hidden;
  $("help-button").setAttribute("aria-expanded", String(!$("help").hidden));
}

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (target.matches("input:not([type=range], [type=checkbox], [type=radio], [type=color]), select, textarea")) return;
  if (target.matches("input[type=range]") && /^(Arrow|Page|Home|End)/.test(key)) return;
  if (key === "?" || (key === "Escape" && !$("help").hidden)) return toggleHelp();
  if (!page.open) return;
  if ((event.ctrlKey || event.metaKey) && /^[zy]$/i.test(key)) {
    event.preventDefault();
    correct(key.toLowerCase() === "y" || event.shiftKey ? "redo" : "undo");
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === " " && !target.matches("button, summary, input")) {
    event.preventDefault();
    view.hidden = true;
    view.draw();
    return;
  }
  if (key === "Enter" && target === view.canvas) {
    const { label } = view.middle() || {};
    select(label ? [...(event.shiftKey ? chosen() : []), label] : []);
    return;
  }
  if (event.shiftKey && PANS[key]) {
    event.preventDefault();
    view.pan(...PANS[key]);
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

$("help-button").addEventListener("click", toggleHelp);
for (const [keys, text] of KEYS) {
  const pair = $("keys").appendChild(element("div"));
  pair.append(element("dt"), element("dd", text));
  pair.firstChild.append(element("kbd", keys));
}
