// Measurements as a table that sorts by a click on a column, and of one cell as a list.

const USUAL = ["label", "score", "area_um2", "area", "circularity", "eccentricity", "solidity", "intensity_mean"];
const MOST = 500;
const WORDS = { yes: 1, true: 1, no: 0, false: 0 };

export const cellsOf = (number) => `${number} ${number === 1 ? "cell" : "cells"}`;

export function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(4);
}

export class Table {
  constructor(place) {
    this.place = place;
    this.onPick = () => {};
    this.column = "label";
    this.up = true;
    this.all = false;
    this.conditions = []; // [column, operator, number]
    this.columns = {};
    place.addEventListener("click", (event) => {
      const sort = event.target.closest("button[data-column]");
      const row = event.target.closest("tr[data-row]");
      if (sort) {
        this.up = this.column === sort.dataset.column ? !this.up : true;
        this.column = sort.dataset.column;
        this.draw();
        place.querySelector(`button[data-column="${CSS.escape(this.column)}"]`)?.focus();
      } else if (row) this.onPick(Number(row.dataset.row));
    });
  }

  // One list per column; row k is the k-th cell.
  set(columns) {
    this.columns = columns;
    if (!(this.column in columns)) this.column = "label";
    this.draw();
  }

  get length() {
    return this.columns.label?.length || 0;
  }

  names() {
    const every = Object.keys(this.columns);
    if (this.all) return every;
    const some = USUAL.filter((name) => every.includes(name));
    return some.includes("area_um2") ? some.filter((name) => name !== "area") : some;
  }

  // Show the cells that meet conditions as "score < 0.5, area > 300" or "touches_border = yes"; returns
  // what is wrong with them.
  filter(text) {
    const parts = text.split(/,|\s+and\s+/i).map((part) => part.trim()).filter(Boolean);
    const conditions = [];
    for (const part of parts) {
      const [, name, sign, value] = /^(\w+)\s*(<=|>=|<|>|=)\s*(\S+)$/.exec(part) || [];
      const number = value?.toLowerCase() in WORDS ? WORDS[value.toLowerCase()] : Number(value);
      if (Number.isNaN(number)) return `"${part}" must be a column, one of < <= = >= >, and a number, yes or no`;
      if (!(name in this.columns)) return `There is no column ${name}`;
      conditions.push([name, sign, number]);
    }
    this.conditions = conditions;
    this.draw();
    return "";
  }

  // Rows that the filter lets through, in the order of the table.
  order() {
    const values = this.columns[this.column] || [];
    const sign = this.up ? 1 : -1;
    const meets = (row) => this.conditions.every(([name, operator, number]) => {
      if ((this.columns[name]?.[row] ?? null) === null) return false;
      const value = Number(this.columns[name][row]); // yes is 1
      return { "<": value < number, "<=": value <= number, "=": value === number, ">=": value >= number, ">": value > number }[operator];
    });
    return [...values.keys()].filter(meets).sort((a, b) => {
      if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null);
      return sign * (values[a] - values[b]) || a - b;
    });
  }

  draw() {
    const names = this.names();
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const name of names) {
      const cell = head.appendChild(element("th"));
      cell.scope = "col";
      const sorted = name === this.column;
      if (sorted) cell.setAttribute("aria-sort", this.up ? "ascending" : "descending");
      const button = cell.appendChild(element("button", name + (sorted ? (this.up ? " ▲" : " ▼") : "")));
      button.type = "button";
      button.dataset.column = name;
    }
    const body = table.createTBody();
    const order = this.order();
    for (const k of order.slice(0, MOST)) {
      const row = body.insertRow();
      row.dataset.row = k;
      for (const name of names) row.insertCell().textContent = shown(this.columns[name][k]);
    }
    this.place.replaceChildren(table);
    if (order.length > MOST) {
      this.place.append(element("p", `The first ${MOST} of ${order.length} cells; the download has all.`));
    }
    this.mark(this.marked || []);
  }

  // Show rows as selected.
  mark(rows) {
    this.marked = rows;
    const wanted = new Set(rows.map(String));
    for (const row of this.place.querySelectorAll("tr[data-row]")) {
      row.classList.toggle("selected", wanted.has(row.dataset.row));
    }
  }

  list(row) {
    const table = element("table");
    const usual = USUAL.filter((name) => name in this.columns);
    for (const name of new Set([...usual, ...Object.keys(this.columns)])) {
      if (/^(bbox|centroid)/.test(name)) continue;
      const line = table.insertRow();
      line.insertCell().textContent = name;
      line.insertCell().textContent = shown(this.columns[name][row]);
    }
    return table;
  }
}

export function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
