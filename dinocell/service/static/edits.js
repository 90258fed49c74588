// Labels with an undo that has no limit: each change keeps the pixels that it has changed, and no more.

export class Edits {
  constructor() {
    this.done = [];
    this.undone = [];
  }

  // Change labels to those that `paint(label, index)` gives; `note` goes with the change.
  change(labels, paint, note) {
    const indices = [], before = [], after = [];
    for (let i = 0; i < labels.length; i++) {
      const value = paint(labels[i], i);
      if (value === labels[i]) continue;
      indices.push(i);
      before.push(labels[i]);
      after.push(value);
      labels[i] = value;
    }
    const entry = {
      indices: Uint32Array.from(indices), before: Uint32Array.from(before), after: Uint32Array.from(after), note,
    };
    this.done.push(entry);
    this.undone = [];
    return entry;
  }

  undo(labels) {
    return this.move(labels, this.done, this.undone, "before");
  }

  redo(labels) {
    return this.move(labels, this.undone, this.done, "after");
  }

  move(labels, from, to, side) {
    const entry = from.pop();
    if (!entry) return null;
    to.push(entry);
    entry.indices.forEach((index, k) => { labels[index] = entry[side][k]; });
    return entry;
  }
}

// The numbers of the cells, ascending: the service closes gaps in this order.
export function numbersOf(labels) {
  const seen = new Set();
  let last = 0;
  for (const label of labels) {
    if (label !== last) seen.add(label);
    last = label;
  }
  seen.delete(0);
  return Uint32Array.from(seen).sort();
}
