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

  // What each of 256 levels adds to red, green and blue, in ten bits each.
  levels() {
    const value = parseInt(this.colour.slice(1), 16);
    const part = (level, shift) => Math.round((level * ((value >> shift) & 255)) / 255);
    return Int32Array.from({ length: 256 }, (_, level) => (part(level, 16) << 20) | (part(level, 8) << 10) | part(level, 0));
  }
}

// Draw the sum of layers: [layer, its pixels in the size of the canvas].
export function paintLayers(canvas, pairs) {
  const context = canvas.getContext("2d");
  const target = context.createImageData(canvas.width, canvas.height);
  const pixels = new Int32Array(target.data.buffer);
  if (pairs.length === 1 && pairs[0][0].colour === "#ffffff") paintGray(pixels, ...pairs[0]);
  else {
    pairs.forEach(([layer, data], k) => {
      if (k > 3 && k % 3 === 1) finish(pixels, 20, 10, 0, 0); // four sums fit into ten bits
      addLayer(pixels, layer, data);
    });
    finish(pixels, 0, 8, 16, 255 << 24);
  }
  context.putImageData(target, 0, 0);
}

function paintGray(pixels, { low, high }, data) {
  const factor = 255 / (high - low);
  for (let i = 0; i < data.length; i++) {
    const level = (data[i] - low) * factor + 0.5;
    pixels[i] = (255 << 24) | ((level <= 0 ? 0 : level >= 255 ? 255 : level | 0) * 0x010101);
  }
}

function addLayer(sums, layer, data) {
  const { low, high } = layer, levels = layer.levels(), factor = 255 / (high - low);
  for (let i = 0; i < data.length; i++) {
    const level = (data[i] - low) * factor + 0.5;
    sums[i] = (sums[i] + levels[level <= 0 ? 0 : level >= 255 ? 255 : level | 0]) | 0;
  }
}

// Cut sums off at 255, and move them to their bits.
function finish(sums, toRed, toGreen, toBlue, more) {
  for (let i = 0; i < sums.length; i++) {
    const red = sums[i] >> 20, green = (sums[i] >> 10) & 1023, blue = sums[i] & 1023;
    sums[i] = more | ((red > 255 ? 255 : red) << toRed) | ((green > 255 ? 255 : green) << toGreen) | ((blue > 255 ? 255 : blue) << toBlue);
  }
}
