// Corrections by hand: tools for the mouse, and what the service makes of them.

import * as api from "./api.js";
import { applyChange, endMovement, reload, select } from "./result.js";
import { $, guarded, inTurn, page, say, view } from "./state.js";

const HINTS = {
  split: "Draw a line through a cell, or click two points in it. S once more splits the selected cell by itself; Esc ends",
  paint: "Paint a new cell, or from the selected one on more of it. [ and ] change the brush; B or Esc ends",
  erase: "Erase cells, or the selected ones only. [ and ] change the eraser; E or Esc ends",
  box: "Draw a rectangle: the cells in it are selected, and Delete removes them",
};
let seeds = [];
let waiting = 0; // corrections that the service does not have yet
let result = null; // the selection that the answer to a correction made

// Ask the service for a correction; it is saved there at once.  Waits while the service is away.
export async function correct(kind, values = {}) {
  const shown = page.open;
  if (shown?.revision === undefined) return;
  endMovement();
  waiting += 1;
  const chosen = view.selected; // `select` makes another set
  await guarded(() => inTurn(async () => {
    for (;;) {
      try {
        const change = await api.correct(shown.id, { kind, ...values }, shown.revision, !shown.tiles);
        const reverts = ["undo", "redo"].includes(kind); // numbers may be those of other cells
        const stays = () => !reverts && ![chosen, result].includes(view.selected); // the user has gone on meanwhile
        if (!stays()) view.selected.clear();
        const found = await applyChange(shown, change);
        if (page.open === shown && !stays()) {
          select(reverts || ["remove", "erase"].includes(kind) ? [] : found);
          result = view.selected;
        }
        say("");
        return;
      } catch (error) {
        if (error.status === 409) {
          await reload();
          say("Somebody else has changed these labels. Their labels are shown now: repeat your correction");
          return;
        }
        if (error.status) throw error;
        say("The service does not answer. Your correction waits until it does");
        await new Promise((resolve) => setTimeout(resolve, 2000));
      }
    }
  }));
  waiting -= 1;
}

export function remove(cells) {
  if (cells.length) correct("remove", { cells });
  else say("No cell is selected: click one first");
}

export function merge(cells) {
  const chosen = [...new Set(cells)];
  if (chosen.length > 1) correct("merge", { cells: chosen });
  else say("Two cells or more must be selected to merge them: click one, then Shift + click others");
}

addEventListener("beforeunload", (event) => {
  if (waiting) event.preventDefault();
});

// --- tools ---

export function setTool(tool) {
  seeds = [];
  view.tool = tool;
  view.seeds = [];
  for (const name of ["split", "paint", "erase", "box"]) $(`tool-${name}`).setAttribute("aria-pressed", String(tool === name));
  $("brush").hidden = tool !== "paint" && tool !== "erase";
  say(HINTS[tool] || "");
  view.draw();
}

export function toggleTool(tool) {
  const again = view.tool === tool;
  setTool(again ? null : tool);
  if (!again || tool !== "split") return;
  if (view.selected.size === 1) correct("split", { cells: [...view.selected] });
  else say("One cell must be selected to split it by itself: click it first");
}

export function setRadius(radius) {
  view.radius = Math.min(60, Math.max(1, radius));
  $("radius").value = view.radius;
  $("radius-value").textContent = `${view.radius} px`;
  view.draw();
}

// Grow a missed cell from the pixel under the mouse, or in the middle of the picture.
export function grow(at = view.pointed()) {
  if (at) correct("grow", { points: [[at.y, at.x]] });
}

view.onStroke = (points) => {
  const tool = view.tool;
  const positions = points.map(([x, y]) => [y, x]);
  const cells = [...view.selected];
  if (tool === "split") cut(positions);
  else if (tool === "paint") {
    const under = cells.length ? view.labelsAlong(points) : new Set();
    correct("paint", { points: positions, radius_px: view.radius, cells: cells.filter((cell) => under.has(cell)).slice(0, 1) });
  }
  else if (tool === "erase") correct("erase", { points: positions, radius_px: view.radius, cells });
  else {
    const [[x0, y0], [x1, y1]] = [points[0], points.at(-1)];
    select(view.labelsIn(Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)));
    setTool(null);
  }
};

function cut(points) {
  const [[row, column], [toRow, toColumn]] = [points[0], points.at(-1)];
  if (Math.hypot(toRow - row, toColumn - column) * view.scale > 5 || points.length > 20) {
    setTool(null);
    correct("cut", { points });
    return;
  }
  const label = view.labelIn(column, row);
  if (!label) return;
  if (seeds.length && view.labelIn(seeds[0][1], seeds[0][0]) !== label) seeds = [];
  seeds.push(points[0]);
  view.seeds = seeds.map(([y, x]) => [x, y]);
  view.draw();
  if (seeds.length < 2) return;
  const chosen = seeds;
  setTool(null);
  correct("split", { cells: [label], points: chosen });
}

view.onClick = (at, event) => {
  if (!at || !page.open) return;
  const { label } = at;
  if (event.altKey && label && view.selected.size) merge([...view.selected, label]);
  else if ((event.ctrlKey || event.metaKey) && label) remove([label]);
  else if (event.shiftKey) {
    const chosen = new Set(view.selected);
    if (label && !chosen.delete(label)) chosen.add(label);
    select([...chosen]);
  } else select(label ? [label] : []);
};

view.canvas.addEventListener("dblclick", (event) => {
  const at = view.labelAt(event);
  if (at && !at.label && !view.tool) grow(at);
});
for (const name of ["split", "paint", "erase", "box"]) $(`tool-${name}`).addEventListener("click", () => toggleTool(name));
$("tool-grow").addEventListener("click", () => grow(view.middle()));
$("radius").addEventListener("input", () => setRadius(Number($("radius").value)));
$("undo").addEventListener("click", () => correct("undo"));
$("redo").addEventListener("click", () => correct("redo"));
$("remove").addEventListener("click", () => remove([...view.selected]));
$("merge").addEventListener("click", () => merge([...view.selected]));
setRadius(4);
