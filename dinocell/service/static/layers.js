// Intensities that are drawn: the gray plane or a channel, with its window and colour.

export class Layer {
  // `channel` is the position in the file, null for the gray plane; `colour` is #rrggbb
  constructor({ channel = null, name = "", colour = "#ffffff", visible = false }) {
    Object.assign(this, { channel, name, colour, visible });
    this.byHand = null; // [black, white] in units of the file; null where they are automatic
    this.pixels = null; // of the whole image, where it does not come in tiles
    this.sample = null; // sorted; null until pixels have been seen
  }

  get title() {
    return /^\d+$/.test(this.name) ? `channel ${this.name}` : this.name;
  }

  // Take range and percentiles from pixels: all, or those of a smaller scale.
  learn(data) {
    const step = Math.max(1, Math.floor(data.length / 200000));
    const sample = new Float64Array(Math.ceil(data.length / step));
    let least = Infinity, most = -Infinity;
    for (let i = 0, k = 0; i < data.length; i++) {
      const value = data[i];
      if (value < least) least = value;
      if (value > most) most = value;
      if (i % step === 0) sample[k++] = value;
    }
    this.sample = sample.sort();
    this.type = data.constructor.name;
    this.range = [least, most > least ? most : least + 1];
    this.whole = !this.type.startsWith("Float");
  }

  // The value below which `percent` of the pixels lie.
  percentile(percent) {
    const { sample, range } = this;
    if (percent <= 0) return range[0];
    if (percent >= 100) return range[1];
    return sample[Math.min(sample.length - 1, Math.floor((percent / 100) * sample.length))];
  }

  setWindow(low, high) {
    this.low = low;
    this.high = Math.max(high, low + (this.range[1] - this.range[0]) / 1e6);
  }

  // [place, share] of red, green and blue, as far as the colour has them.
  parts() {
    const value = parseInt(this.colour.slice(1), 16);
    return [16, 8, 0].map((shift, place) => [place, ((value >> shift) & 255) / 255]).filter(([, share]) => share);
  }
}

// Draw the sum of layers: [layer, its pixels in the size of the canvas].
export function paintLayers(canvas, pairs) {
  const context = canvas.getContext("2d");
  const target = context.createImageData(canvas.width, canvas.height);
  const whole = new Uint32Array(target.data.buffer).fill(255 << 24);
  if (pairs.length === 1 && pairs[0][0].colour === "#ffffff") paintGray(whole, ...pairs[0]);
  else for (const [layer, data] of pairs) addLayer(target.data, layer, data);
  context.putImageData(target, 0, 0);
}

function paintGray(whole, { low, high }, data) {
  const factor = 255 / (high - low);
  for (let i = 0; i < data.length; i++) {
    const level = (data[i] - low) * factor;
    whole[i] = (255 << 24) | ((level <= 0 ? 0 : level >= 255 ? 255 : level | 0) * 0x010101);
  }
}

// `bytes` cuts off what is above 255.
function addLayer(bytes, layer, data) {
  const { low, high } = layer;
  for (const [place, share] of layer.parts()) {
    const most = 255 * share, factor = most / (high - low);
    for (let i = 0, j = place; i < data.length; i++, j += 4) {
      const level = (data[i] - low) * factor;
      if (level > 0) bytes[j] += level < most ? level : most;
    }
  }
}
