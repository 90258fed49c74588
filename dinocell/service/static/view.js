// The picture: intensities, labels on top, pan and zoom.  Positions are (x, y) = (column, row) in pixels.

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
  constructor(canvas, { onClick, onHover }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.picture = document.createElement("canvas");
    this.overlay = document.createElement("canvas");
    this.image = null;
    this.scale = 1;
    this.x = this.y = 0; // image position at the upper left corner of the canvas
    this.style = "outline";
    this.opacity = 1;
    this.thickness = 1; // of outlines, in pixels of the image
    this.hidden = false;
    this.selected = new Set();
    this.pointers = new Map();
    this.listen(onClick, onHover);
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // { data, shape } of (H, W) or (H, W, 3), and Uint32 labels
  show(image, labels) {
    this.image = image;
    [this.height, this.width] = image.shape;
    for (const layer of [this.picture, this.overlay]) {
      layer.width = this.width;
      layer.height = this.height;
    }
    this.statistics();
    this.labels = labels;
    this.selected.clear();
    this.auto();
    this.paintLabels();
    this.fit();
  }

  close() {
    this.image = null;
    this.draw();
  }

  // Range of the values, and the percentiles 0.5 and 99.8 of a sample of them.
  statistics() {
    const { data } = this.image;
    const step = Math.max(1, Math.floor(data.length / 200000));
    const sample = [];
    let least = Infinity, most = -Infinity;
    for (let i = 0; i < data.length; i++) {
      const value = data[i];
      if (value < least) least = value;
      if (value > most) most = value;
      if (i % step === 0) sample.push(value);
    }
    sample.sort((a, b) => a - b);
    this.range = [least, most > least ? most : least + 1];
    const colours = this.image.shape.length === 3;
    const at = (share) => sample[Math.min(sample.length - 1, Math.floor(share * sample.length))];
    this.usual = colours ? [0, 255] : [at(0.005), at(0.998)];
    if (this.usual[1] <= this.usual[0]) this.usual = [...this.range];
    if (colours) this.range = [0, 255];
  }

  auto() {
    this.setWindow(...this.usual);
  }

  setWindow(low, high) {
    this.low = low;
    this.high = Math.max(high, low + (this.range[1] - this.range[0]) / 1e6);
    this.paintPicture();
    this.draw();
  }

  paintPicture() {
    const { data, shape } = this.image;
    const context = this.picture.getContext("2d");
    const target = context.createImageData(this.width, this.height);
    const pixels = new Uint32Array(target.data.buffer);
    const factor = 255 / (this.high - this.low);
    const level = (value) => {
      const scaled = (value - this.low) * factor;
      return scaled <= 0 ? 0 : scaled >= 255 ? 255 : scaled | 0;
    };
    if (shape.length === 3) {
      for (let i = 0, j = 0; i < pixels.length; i++, j += 3) {
        pixels[i] = (255 << 24) | (level(data[j + 2]) << 16) | (level(data[j + 1]) << 8) | level(data[j]);
      }
    } else {
      for (let i = 0; i < pixels.length; i++) pixels[i] = (255 << 24) | (level(data[i]) * 0x010101);
    }
    context.putImageData(target, 0, 0);
  }

  paintLabels() {
    const { width, height, labels, selected } = this;
    const context = this.overlay.getContext("2d");
    const target = context.createImageData(width, height);
    const pixels = new Uint32Array(target.data.buffer);
    const outline = this.style !== "fill";
    const t = this.thickness, down = t * width;
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        const label = labels[i];
        if (!label) continue;
        const chosen = selected.size && selected.has(label);
        if (outline || chosen) {
          const border = (x >= t && labels[i - t] !== label) || (x < width - t && labels[i + t] !== label) ||
            (y >= t && labels[i - down] !== label) || (y < height - t && labels[i + down] !== label);
          if (border) pixels[i] = chosen ? 0xffffffff : hues[label % 4096];
          else if (chosen) pixels[i] = (hues[label % 4096] & 0xffffff) | (110 << 24);
        } else pixels[i] = hues[label % 4096];
      }
    }
    context.putImageData(target, 0, 0);
    this.draw();
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
    if (!this.image) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    this.scale = Math.min(width / this.width, height / this.height) * 0.98 || 1;
    this.x = (this.width - width / this.scale) / 2;
    this.y = (this.height - height / this.scale) / 2;
    this.fitted = true;
    this.draw();
  }

  // Zoom, with the position (px, py) of the canvas held; without one its centre.
  zoom(factor, px, py) {
    if (!this.image) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    [px, py] = px === undefined ? [width / 2, height / 2] : [px, py];
    const scale = Math.min(64, Math.max(0.02, this.scale * factor));
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
      if (!this.image) return;
      const scale = this.scale * ratio;
      const thickness = scale < 0.8 ? Math.min(6, Math.round(1.6 / scale)) : 1;
      if (thickness !== this.thickness) { // seen from far, thin lines would fade
        this.thickness = thickness;
        this.paintLabels();
      }
      context.setTransform(scale, 0, 0, scale, -this.x * scale, -this.y * scale);
      context.imageSmoothingEnabled = scale < 1;
      context.drawImage(this.picture, 0, 0);
      if (!this.hidden && this.style !== "none") {
        context.globalAlpha = this.opacity * (this.style === "fill" ? 0.5 : 1);
        context.drawImage(this.overlay, 0, 0);
        context.globalAlpha = 1;
      }
    });
  }

  labelAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor(this.x + (event.clientX - box.left) / this.scale);
    const y = Math.floor(this.y + (event.clientY - box.top) / this.scale);
    if (!this.image || x < 0 || y < 0 || x >= this.width || y >= this.height) return null;
    return { x, y, label: this.labels[y * this.width + x] };
  }

  listen(onClick, onHover) {
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
      if (pointers.size === 1) moved = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) {
        onHover(this.labelAt(event));
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
        if (moved > 4) this.pan(before.clientX - event.clientX, before.clientY - event.clientY);
      }
      pointers.set(event.pointerId, event);
    });
    canvas.addEventListener("pointerup", (event) => {
      pointers.delete(event.pointerId);
      if (moved <= 4) onClick(this.labelAt(event), event);
    });
    canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => onHover(null));
  }
}
