// Large images: tiles at several scales from the service, as many as the screen shows.
// A tile of level L covers EDGE · 2^L pixels of the image and has every 2^L-th of them.

import * as api from "./api.js";

const EDGE = 512; // as in dinocell/service/tiles.py
const KEPT_MB = 560; // of tiles in memory: labels and two canvases need 3 MB, each channel 0.5 MB
const AT_ONCE = 4; // requests
const PAINTED = 2; // tiles in a frame

export class Tiles {
  // `shown` gives the layers that are drawn; `changed` is called when a tile has come
  constructor(id, height, width, shown, changed) {
    Object.assign(this, { id, height, width, shown, changed });
    this.top = Math.max(0, Math.ceil(Math.log2(Math.max(height, width) / EDGE)));
    this.tiles = new Map(); // "level/row/column" → tile; its parts are the pixels of channels, and "labels"
    this.turns = new Map(); // of the same keys: how often labels were asked for
    this.loading = new Set();
    this.wanted = [];
    this.frame = 0;
  }

  // The pixels of layers in the whole image at its smallest scale.
  async whole(layers) {
    const channels = layers.map(({ channel }) => channel);
    const found = await api.imageTile(this.id, this.top, 0, 0, channels);
    channels.forEach((channel, k) => this.put(this.top, 0, 0, channel, found[k]));
    return found;
  }

  close() {
    this.closed = true;
    this.tiles.clear();
  }

  put(level, row, column, part, data) {
    const key = `${level}/${row}/${column}`;
    let tile = this.tiles.get(key);
    if (!tile) {
      const size = (extent, place) => Math.min(EDGE, Math.ceil(extent / 2 ** level) - place * EDGE);
      const [height, width] = [size(this.height, row), size(this.width, column)];
      tile = { level, row, column, height, width, parts: new Map(), used: this.frame };
      tile.picture = new OffscreenCanvas(width, height);
      tile.overlay = new OffscreenCanvas(width, height);
      this.tiles.set(key, tile);
    }
    tile.parts.set(part, data);
    tile.stale = true;
  }

  // The channels that a tile lacks, and "labels" if it lacks them.
  lacks(place) {
    const parts = this.tiles.get(place.join("/"))?.parts;
    return [...this.shown().map(({ channel }) => channel), "labels"].filter((part) => !parts?.has(part));
  }

  async fetch(level, row, column) {
    const key = `${level}/${row}/${column}`;
    this.loading.add(key);
    try {
      const channels = this.lacks([level, row, column]).filter((part) => part !== "labels");
      const found = channels.length ? await api.imageTile(this.id, level, row, column, channels) : [];
      if (this.closed) return;
      channels.forEach((channel, k) => this.put(level, row, column, channel, found[k]));
      this.changed();
      if (!this.tiles.get(key)?.parts.has("labels")) await this.fetchLabels(level, row, column);
    } catch (error) {
      if (error.status !== 0) throw error; // the service is away: the next frame asks again
    } finally {
      this.loading.delete(key);
      this.more();
    }
  }

  async fetchLabels(level, row, column) {
    const key = `${level}/${row}/${column}`, turn = (this.turns.get(key) || 0) + 1;
    this.turns.set(key, turn);
    const { data, revision } = await api.labelsTile(this.id, level, row, column);
    if (this.closed || this.turns.get(key) !== turn) return; // a later request counts
    this.put(level, row, column, "labels", data);
    this.tiles.get(key).revision = revision;
    this.changed();
  }

  more() {
    while (!this.closed && this.loading.size < AT_ONCE && this.wanted.length) {
      const [level, row, column] = this.wanted.shift();
      this.fetch(level, row, column).catch((error) => console.error(error));
    }
  }

  // Layers, contrast, selection or style have changed.
  repaint() {
    for (const tile of this.tiles.values()) tile.stale = true;
  }

  // Fetch labels that are older than a revision, or on their way, again.
  async upTo(revision) {
    const old = [...this.turns.keys()].filter((key) => !(this.tiles.get(key)?.revision >= revision));
    await Promise.all(old.map((key) => this.fetchLabels(...key.split("/").map(Number))));
  }

  // Labels of a box of pixels have changed.
  async refresh(box) {
    const work = [];
    for (const { level, row, column } of this.tiles.values()) {
      const size = EDGE * 2 ** level;
      if (row * size < box.row + box.height && (row + 1) * size > box.row &&
        column * size < box.column + box.width && (column + 1) * size > box.column) {
        work.push(this.fetchLabels(level, row, column));
      }
    }
    await Promise.all(work);
  }

  labelIn(x, y) {
    for (let level = 0; level <= this.top; level++) {
      const size = EDGE * 2 ** level, step = 2 ** level;
      const [row, column] = [Math.floor(y / size), Math.floor(x / size)];
      const tile = this.tiles.get(`${level}/${row}/${column}`), labels = tile?.parts.get("labels");
      if (labels) return labels[Math.floor((y - row * size) / step) * tile.width + Math.floor((x - column * size) / step)];
    }
    return undefined;
  }

  valuesIn(x, y) {
    const tile = this.tiles.get(`0/${Math.floor(y / EDGE)}/${Math.floor(x / EDGE)}`);
    const there = this.shown().filter(({ channel }) => tile?.parts.has(channel));
    const place = (y % EDGE) * tile?.width + (x % EDGE);
    return there.map((layer) => [layer, tile.parts.get(layer.channel)[place]]);
  }

  // Draw what is visible; coarser tiles below where finer ones are still to come.
  draw(context, view, ratio) {
    this.frame += 1;
    const level = Math.min(this.top, Math.max(0, Math.floor(Math.log2(1 / (view.scale * ratio)))));
    const [width, height] = [context.canvas.width / ratio / view.scale, context.canvas.height / ratio / view.scale];
    const fine = [...this.places(level, view.x, view.y, width, height)];
    const missing = fine.filter((place) => this.lacks(place).length);
    this.wanted = missing.filter((place) => !this.loading.has(place.join("/")));
    const levels = missing.length ? [this.top, level + 1, level] : [level];
    const shown = this.shown();
    let left = PAINTED;
    for (const at of new Set(levels.filter((one) => one <= this.top))) {
      for (const [, row, column] of at === level ? fine : this.places(at, view.x, view.y, width, height)) {
        const tile = this.tiles.get(`${at}/${row}/${column}`);
        if (!tile || (shown.length && !shown.some(({ channel }) => tile.parts.has(channel)))) continue;
        tile.used = this.frame;
        if (tile.stale && (at === this.top || left-- > 0)) view.paintTile(tile);
        const size = EDGE * 2 ** at;
        const place = [column * size, row * size, tile.width * 2 ** at, tile.height * 2 ** at];
        context.drawImage(tile.picture, ...place);
        if (view.showsLabels() && tile.parts.has("labels")) {
          context.globalAlpha = view.labelAlpha();
          context.drawImage(tile.overlay, ...place);
          context.globalAlpha = 1;
        }
      }
    }
    this.more();
    this.forget();
    if (left < 0) view.draw(); // the others in the next frame
  }

  // [level, row, column] of the tiles in a rectangle of the image.
  *places(level, x, y, width, height) {
    const size = EDGE * 2 ** level;
    const last = (extent, end) => Math.min(Math.ceil(extent / size) - 1, Math.floor(end / size));
    for (let row = Math.max(0, Math.floor(y / size)); row <= last(this.height, y + height); row++) {
      for (let column = Math.max(0, Math.floor(x / size)); column <= last(this.width, x + width); column++) {
        yield [level, row, column];
      }
    }
  }

  forget() {
    const most = KEPT_MB / (3 + 0.5 * this.shown().length);
    if (this.tiles.size <= most) return;
    const old = [...this.tiles].filter(([, tile]) => tile.level !== this.top && tile.used < this.frame);
    old.sort(([, a], [, b]) => a.used - b.used);
    for (const [key] of old.slice(0, this.tiles.size - most)) {
      this.tiles.delete(key);
      this.turns.delete(key);
    }
  }
}
