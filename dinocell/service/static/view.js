// The picture: intensities, labels on top, pan and zoom.  Positions are (x, y) = (column, row) in pixels.

import { paintLayers } from "./layers.js";

const hues = new Uint32Array(4096);
for (let i = 0; i < hues.length; i++) hues[i] = colour((i * 0.6180339887 + 0.1) % 1, i % 3);

function colour(hue, shade) {
  const light = [0.62, 0.5, 0.72][shade];
  const part = (n) => {
    const k = (n + hue * 12) % 12;
    const a = 0.9 * Math.min(light, 1 - light);
    return Math.round(255 * (light - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return (255 << 24) | (part(4) << 16) | (part(8) << 8) | part(0);
}

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.onClick = this.onHover = this.onStroke = () => {};
    this.context = canvas.getContext("2d");
    this.picture = document.createElement("canvas");
    this.overlay = document.createElement("canvas");
    this.layers = null;
    this.scale = 1;
    this.x = this.y = 0; // image position at the upper left corner of the canvas
    this.style = "outline";
    this.opacity = 1;
    this.thickness = 1; // of outlines, in pixels of the image
    this.hidden = false;
    this.selected = new Set();
    this.touched = new Set(); // drawn with dashed outlines
    this.tool = null; // split, paint, erase, box: a drag is then a stroke, and does not move the picture
    this.radius = 4; // of the brush, in pixels of the image
    this.stroke = null; // positions [x, y] of the stroke that is being drawn
    this.seeds = []; // positions that are marked
    this.pointers = new Map();
    this.listen();
    canvas.addEventListener("focus", () => this.draw());
    canvas.addEventListener("blur", () => this.draw());
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  clear() {
    this.tiles?.close();
    this.tiles = this.layers = null;
  }

  // `layers` are the gray plane and the channels of the file.  With `tiles` their pixels and the labels
  // come from there, else each layer has its pixels, and the labels are Uint32.
  show({ layers, height, width, tiles = null, labels = null, touched = new Set() }) {
    this.clear();
    Object.assign(this, { layers, height, width, tiles, labels, touched });
    if (!tiles) {
      for (const layer of [this.picture, this.overlay]) {
        layer.width = width;
        layer.height = height;
      }
      this.paintLabels();
    }
    this.selected.clear();
    this.repaint();
    this.fit();
  }

  // The layers that are drawn: the gray plane, or else channels.
  shown() {
    const [plane, ...channels] = this.layers;
    return plane.visible ? [plane] : channels.filter((one) => one.visible && one.sample);
  }

  setLabels(labels, touched) {
    this.labels = labels;
    this.touched = touched;
    this.paintLabels();
  }

  close() {
    this.clear();
    this.draw();
  }

  // Layers, their windows or colours have changed; the next frame shows it.
  repaint() {
    this.stale = true;
    this.draw();
  }

  paintPicture() {
    this.stale = false;
    if (this.tiles) this.tiles.repaint();
    else paintLayers(this.picture, this.shown().map((layer) => [layer, layer.pixels]));
  }

  paintLabels() {
    if (this.tiles) this.tiles.repaint();
    else this.paintCells(this.overlay, this.labels, this.width, this.height, this.thickness);
    this.draw();
  }

  paintTile(tile) {
    const { parts } = tile;
    const there = this.shown().filter(({ channel }) => parts.has(channel));
    paintLayers(tile.picture, there.map((layer) => [layer, parts.get(layer.channel)]));
    if (parts.has("labels")) this.paintCells(tile.overlay, parts.get("labels"), tile.width, tile.height, 1);
    tile.stale = false;
  }

  paintCells(canvas, labels, width, height, t) {
    const { selected, touched } = this;
    const context = canvas.getContext("2d");
    const target = context.createImageData(width, height);
    const pixels = new Uint32Array(target.data.buffer);
    const outline = this.style !== "fill";
    const down = t * width;
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        const label = labels[i];
        if (!label) continue;
        const chosen = selected.size && selected.has(label);
        if (outline || chosen) {
          const border = (x >= t && labels[i - t] !== label) || (x < width - t && labels[i + t] !== label) ||
            (y >= t && labels[i - down] !== label) || (y < height - t && labels[i + down] !== label);
          const gap = border && touched.size && (x + y) % (8 * t) < 3 * t && touched.has(label);
          if (gap) pixels[i] = 0xff000000;
          else if (border) pixels[i] = chosen ? 0xffffffff : hues[label % 4096];
          else if (chosen) pixels[i] = (hues[label % 4096] & 0xffffff) | (110 << 24);
        } else pixels[i] = hues[label % 4096];
      }
    }
    context.putImageData(target, 0, 0);
  }

  showsLabels() {
    return !this.hidden && this.style !== "none";
  }

  labelAlpha() {
    return this.opacity * (this.style === "fill" ? 0.5 : 1);
  }

  resize() {
    const { width, height } = this.canvas.getBoundingClientRect();
    const ratio = devicePixelRatio || 1;
    const old = [this.canvas.width / ratio, this.canvas.height / ratio];
    this.canvas.width = Math.max(1, Math.round(width * ratio));
    this.canvas.height = Math.max(1, Math.round(height * ratio));
    this.x -= (width - old[0]) / 2 / this.scale;
    this.y -= (height - old[1]) / 2 / this.scale;
    if (this.fitted) this.fit();
    this.draw();
  }

  fit() {
    if (!this.layers) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    this.scale = Math.min(width / this.width, height / this.height) * 0.98 || 1;
    this.x = (this.width - width / this.scale) / 2;
    this.y = (this.height - height / this.scale) / 2;
    this.fitted = true;
    this.draw();
  }

  // Zoom, with the position (px, py) of the canvas held; without one its centre.
  zoom(factor, px, py) {
    if (!this.layers) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    [px, py] = px === undefined ? [width / 2, height / 2] : [px, py];
    const scale = Math.min(64, Math.max(0.01, this.scale * factor));
    this.x += px / this.scale - px / scale;
    this.y += py / this.scale - py / scale;
    this.scale = scale;
    this.fitted = false;
    this.draw();
  }

  // By pixels of the screen.
  pan(dx, dy) {
    this.x += dx / this.scale;
    this.y += dy / this.scale;
    this.fitted = false;
    this.draw();
  }

  center(x, y, leastScale) {
    const { width, height } = this.canvas.getBoundingClientRect();
    this.scale = Math.max(this.scale, leastScale);
    this.x = x - width / 2 / this.scale;
    this.y = y - height / 2 / this.scale;
    this.fitted = false;
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      const { context, canvas } = this;
      const ratio = devicePixelRatio || 1;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, canvas.width, canvas.height);
      if (!this.layers) return;
      if (this.stale) this.paintPicture();
      const scale = this.scale * ratio;
      if (this.tiles) {
        context.setTransform(scale, 0, 0, scale, -this.x * scale, -this.y * scale);
        context.imageSmoothingEnabled = scale < 1;
        this.tiles.draw(context, this, ratio);
        this.drawTool(context, ratio);
        return;
      }
      const thickness = scale < 0.8 ? Math.min(6, Math.round(1.6 / scale)) : 1;
      if (thickness !== this.thickness) { // seen from far, thin lines would fade
        this.thickness = thickness;
        this.paintLabels();
      }
      context.setTransform(scale, 0, 0, scale, -this.x * scale, -this.y * scale);
      context.imageSmoothingEnabled = scale < 1;
      context.drawImage(this.picture, 0, 0);
      if (this.showsLabels()) {
        context.globalAlpha = this.labelAlpha();
        context.drawImage(this.overlay, 0, 0);
        context.globalAlpha = 1;
      }
      this.drawTool(context, ratio);
    });
  }

  // The stroke, the seeds, the brush, and the cross that the keyboard works at; in pixels of the canvas.
  drawTool(context, ratio) {
    const scale = this.scale * ratio;
    const { stroke, tool, seeds } = this;
    const brush = tool === "paint" || tool === "erase";
    context.setTransform(1, 0, 0, 1, 0, 0);
    const place = ([x, y]) => [(x - this.x) * scale, (y - this.y) * scale];
    context.lineJoin = context.lineCap = "round";
    context.lineWidth = 2 * ratio;
    context.strokeStyle = context.fillStyle = "#fff";
    if (stroke && this.boxed) {
      const [[x, y], [toX, toY]] = [place(stroke[0]), place(stroke.at(-1))];
      context.setLineDash([6 * ratio, 4 * ratio]);
      context.strokeRect(x, y, toX - x, toY - y);
      context.setLineDash([]);
    } else if (stroke) {
      context.beginPath();
      for (const point of stroke) context.lineTo(...place(point));
      context.lineTo(...place(stroke.at(-1)));
      if (brush) {
        context.globalAlpha = 0.5;
        context.lineWidth = 2 * this.radius * scale;
        context.strokeStyle = tool === "paint" ? "#4fd0b0" : "#ff8a8a";
      }
      context.stroke();
      context.globalAlpha = 1;
    }
    for (const seed of seeds) {
      context.beginPath();
      context.arc(...place(seed), 4 * ratio, 0, 7);
      context.fill();
    }
    context.lineWidth = 1.5 * ratio;
    context.strokeStyle = "#fff";
    if (brush && this.at) {
      context.beginPath();
      context.arc(...place(this.at), this.radius * scale, 0, 7);
      context.stroke();
    }
    if (this.canvas.matches(":focus-visible")) {
      const [x, y] = [this.canvas.width / 2, this.canvas.height / 2];
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + 4 * ratio * dx, y + 4 * ratio * dy);
        context.lineTo(x + 14 * ratio * dx, y + 14 * ratio * dy);
      }
      context.stroke();
    }
  }

  // Position [x, y] in the image of a mouse event, with fractions; may be outside.
  positionOf(event) {
    const box = this.canvas.getBoundingClientRect();
    return [this.x + (event.clientX - box.left) / this.scale, this.y + (event.clientY - box.top) / this.scale];
  }

  // The label at a position; undefined outside the image.
  labelIn(x, y) {
    [x, y] = [Math.floor(x), Math.floor(y)];
    if (!this.layers || x < 0 || y < 0 || x >= this.width || y >= this.height) return undefined;
    return this.tiles ? this.tiles.labelIn(x, y) : this.labels[y * this.width + x];
  }

  // [layer, value] of what is drawn at a pixel, as far as it is loaded.
  valuesIn(x, y) {
    if (this.tiles) return this.tiles.valuesIn(x, y);
    return this.shown().map((layer) => [layer, layer.pixels[y * this.width + x]]);
  }

  labelAt(event) {
    return this.described(...this.positionOf(event));
  }

  described(x, y) {
    const label = this.labelIn(x, y);
    return label === undefined ? null : { x: Math.floor(x), y: Math.floor(y), label };
  }

  // What is in the middle of the canvas.
  middle() {
    const { width, height } = this.canvas.getBoundingClientRect();
    return this.described(this.x + width / 2 / this.scale, this.y + height / 2 / this.scale);
  }

  // What is under the mouse, or else in the middle.
  pointed() {
    return this.at ? this.described(...this.at) : this.middle();
  }

  // The labels of a rectangle.
  labelsIn(x0, y0, x1, y1) {
    const found = new Set();
    const step = this.tiles ? Math.max(1, Math.floor(1 / this.scale)) : 1;
    for (let y = Math.max(0, Math.floor(y0)); y <= Math.min(this.height - 1, y1); y += step) {
      for (let x = Math.max(0, Math.floor(x0)); x <= Math.min(this.width - 1, x1); x += step) {
        found.add(this.labelIn(x, y));
      }
    }
    found.delete(0);
    found.delete(undefined);
    return [...found];
  }

  // The labels that the brush touches on its way along positions [x, y].
  labelsAlong(points) {
    const found = new Set(), reach = this.radius + 1, step = Math.max(1, this.radius / 2);
    let [fromX, fromY] = points[0];
    points.forEach(([x, y], k) => {
      if (k > 0 && k < points.length - 1 && Math.hypot(x - fromX, y - fromY) < step) return;
      const parts = Math.max(1, Math.ceil(Math.hypot(x - fromX, y - fromY) / step));
      for (let part = 1; part <= parts; part++) {
        const [midX, midY] = [fromX + (part / parts) * (x - fromX), fromY + (part / parts) * (y - fromY)];
        for (let dy = -reach; dy <= reach; dy++) {
          const wide = Math.sqrt(reach * reach - dy * dy);
          for (let dx = -wide; dx <= wide; dx++) found.add(this.labelIn(midX + dx, midY + dy));
        }
      }
      [fromX, fromY] = [x, y];
    });
    return found;
  }

  listen() {
    const { canvas, pointers } = this;
    let moved = 0;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      const lines = event.deltaMode === 1 ? 30 : 1;
      this.zoom(Math.exp(-event.deltaY * lines * 0.0015), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      if (pointers.size > 1) this.stroke = null; // two fingers zoom
      else {
        moved = 0;
        this.boxed = this.tool === "box" || (!this.tool && event.shiftKey);
        if (this.layers && event.button === 0 && (this.tool || this.boxed)) this.stroke = [this.positionOf(event)];
      }
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      this.at = event.pointerType === "touch" ? null : this.positionOf(event);
      if (this.tool) this.draw();
      if (!before) {
        this.onHover(this.layers ? this.labelAt(event) : null);
        return;
      }
      if (pointers.size === 2) {
        const [other] = [...pointers.values()].filter((p) => p.pointerId !== event.pointerId);
        const apart = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY) || 1;
        const box = canvas.getBoundingClientRect();
        this.zoom(apart(event) / apart(before), (event.clientX + other.clientX) / 2 - box.left,
          (event.clientY + other.clientY) / 2 - box.top);
        moved = 99;
      } else {
        moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
        if (this.stroke) {
          const [x, y] = this.positionOf(event), [px, py] = this.stroke.at(-1);
          if (Math.hypot(x - px, y - py) > 0.5 && this.stroke.length < 5000) this.stroke.push([x, y]);
          else if (this.stroke.length > 1) this.stroke[this.stroke.length - 1] = [x, y];
          this.draw();
        } else if (moved > 4) this.pan(before.clientX - event.clientX, before.clientY - event.clientY);
      }
      pointers.set(event.pointerId, event);
    });
    canvas.addEventListener("pointerup", (event) => {
      pointers.delete(event.pointerId);
      const { stroke } = this;
      this.stroke = null;
      this.draw();
      if (stroke && (this.tool || moved > 4)) this.onStroke(stroke);
      else if (moved <= 4) this.onClick(this.layers ? this.labelAt(event) : null, event);
    });
    canvas.addEventListener("pointercancel", (event) => {
      pointers.delete(event.pointerId);
      this.stroke = null;
      this.draw();
    });
    canvas.addEventListener("pointerleave", () => {
      this.at = null;
      this.draw();
      this.onHover(null);
    });
  }
}
