// A histogram of one measurement, or a scatter plot of two; a rectangle drawn in it selects cells.

import { cellsOf, element, shown } from "./table.js";

const LEFT = 46, BOTTOM = 22, TOP = 8, RIGHT = 10; // margins in pixels of the screen
const MOST_BINS = 40;

export class Plot {
  constructor(canvas, across, up) {
    this.canvas = canvas;
    this.across = across; // a <select> of columns
    this.up = up; // another, whose first value stands for the number of cells
    this.columns = {};
    this.chosen = new Set(); // rows of selected cells
    this.onBrush = () => {};
    for (const choice of [across, up]) choice.addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.listen();
  }

  set(columns) {
    this.columns = columns;
    const names = Object.keys(columns).filter((name) => name !== "label" && columns[name].some(Number.isFinite));
    for (const [choice, first, usual] of [[this.across, [], "area"], [this.up, [["", "number of cells"]], ""]]) {
      const before = choice.value || usual;
      const options = [...first, ...names.map((name) => [name, name])].map(([value, text]) => {
        const option = element("option", text);
        option.value = value;
        return option;
      });
      choice.replaceChildren(...options);
      choice.value = options.some((option) => option.value === before) ? before : options[0]?.value || "";
    }
    this.draw();
  }

  mark(rows) {
    this.chosen = new Set(rows);
    this.draw();
  }

  // Rows with values on both axes, as [row, x, y]; y is NaN in a histogram.
  points() {
    const x = this.columns[this.across.value] || [];
    const y = this.columns[this.up.value];
    return [...x.keys()].map((row) => [row, x[row], y ? y[row] : NaN])
      .filter(([, a, b]) => Number.isFinite(a) && (!y || Number.isFinite(b)));
  }

  draw() {
    const { canvas } = this;
    const { width, height } = canvas.getBoundingClientRect();
    if (!width) return; // closed
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const [text, accent, line] = ["--quiet", "--accent", "--line"].map((name) => style.getPropertyValue(name));
    const strong = style.getPropertyValue("--text");
    const points = this.points();
    const scatter = this.up.value !== "";
    this.spans = [spanOf(points.map((p) => p[1])), spanOf(points.map((p) => p[2]))];
    const [[x0, x1]] = this.spans;
    this.place = (x, y) => [
      LEFT + ((x - x0) / (x1 - x0)) * (width - LEFT - RIGHT),
      height - BOTTOM - ((y - this.spans[1][0]) / (this.spans[1][1] - this.spans[1][0])) * (height - BOTTOM - TOP),
    ];
    context.font = `12px ${style.fontFamily}`;
    if (scatter) {
      for (const [row, x, y] of points) {
        const chosen = this.chosen.has(row);
        context.fillStyle = chosen ? strong : accent;
        context.beginPath();
        context.arc(...this.place(x, y), chosen ? 4 : 2.5, 0, 7);
        context.fill();
      }
    } else this.bars(context, points, accent, strong);
    context.strokeStyle = line;
    context.strokeRect(LEFT, TOP, width - LEFT - RIGHT, height - BOTTOM - TOP);
    context.fillStyle = text;
    const [[a, b], [c, d]] = this.spans;
    context.textAlign = "left";
    context.fillText(shown(a), LEFT, height - 6);
    context.textAlign = "right";
    context.fillText(shown(b), width - RIGHT, height - 6);
    context.fillText(shown(d), LEFT - 4, TOP + 10);
    context.fillText(shown(c), LEFT - 4, height - BOTTOM);
    if (this.brush) {
      const [[sx, sy], [ex, ey]] = this.brush;
      context.strokeStyle = strong;
      context.setLineDash([4, 3]);
      context.strokeRect(sx, sy, ex - sx, ey - sy);
    }
    const names = scatter ? `${this.up.value} against ${this.across.value}` : `Histogram of ${this.across.value}`;
    canvas.setAttribute("aria-label", `${names} of ${cellsOf(points.length)}, from ${shown(a)} to ${shown(b)}`);
  }

  bars(context, points, accent, strong) {
    const [[x0, x1]] = this.spans;
    const bins = Math.min(MOST_BINS, Math.max(8, Math.ceil(2 * Math.sqrt(points.length))));
    const all = new Array(bins).fill(0), some = new Array(bins).fill(0);
    for (const [row, x] of points) {
      const bin = Math.min(bins - 1, Math.floor((bins * (x - x0)) / (x1 - x0)));
      all[bin] += 1;
      if (this.chosen.has(row)) some[bin] += 1;
    }
    this.spans[1] = [0, Math.max(1, ...all)];
    for (const [counts, colour] of [[all, accent], [some, strong]]) {
      context.fillStyle = colour;
      counts.forEach((count, bin) => {
        const [left, top] = this.place(x0 + (bin * (x1 - x0)) / bins, count);
        const [right, base] = this.place(x0 + ((bin + 1) * (x1 - x0)) / bins, 0);
        if (count) context.fillRect(left + 0.5, top, right - left - 1, base - top);
      });
    }
  }

  listen() {
    const { canvas } = this;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.brush = [at(event), at(event)];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.brush) return;
      this.brush[1] = at(event);
      this.draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const [[sx, sy]] = this.brush || [at(event)];
      const [ex, ey] = at(event);
      this.brush = null;
      const inside = (p, a, b) => p >= Math.min(a, b) - 2 && p <= Math.max(a, b) + 2;
      const scatter = this.up.value !== "";
      const rows = this.points().filter(([, x, y]) => {
        const [px, py] = this.place(x, scatter ? y : 0);
        return inside(px, sx, ex) && (!scatter || inside(py, sy, ey));
      });
      this.onBrush(rows.map(([row]) => row));
    });
  }
}

function spanOf(values) {
  let least = Infinity, most = -Infinity;
  for (const value of values) {
    least = Math.min(least, value);
    most = Math.max(most, value);
  }
  if (!(least <= most)) return [0, 1];
  return most > least ? [least, most] : [least - 0.5, most + 0.5];
}
