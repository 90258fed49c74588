// Which training images an image resembles, and so which thresholds suit it (dinocell/network/familiarity.py).

const CELL = 0.5; // mean of the map over a patch in which the network sees a cell
const BINS = 64; // of the histogram of intensities
const MIDDLE = [0.2, 0.7]; // values of the map that are neither background nor the middle of a cell
const NEIGHBOR = 3; // whose distance counts
const COMPARED = ["undecided", "middle", "edges", "texture", "background"];

/** Sums over the windows of one image of what the network saw in them. */
export class Appearance {
  constructor(isNoise) {
    Object.assign(this, { isNoise, largestCell: 0, background: 0, features: null });
    this.histogram = new Float64Array(BINS);
    this.means = { cells: 0, undecided: 0, middle: 0, edges: 0, texture: 0 }; // over pixels, added up over windows
    this.windows = 0;
  }

  /** Add a window: gray and map (side × side), features (D × h × w) of patches of `patch` px. */
  add(gray, map, side, features, patch) {
    const across = side / patch;
    const numFeatures = features.length / across ** 2;
    this.features ??= new Float64Array(numFeatures);
    for (let place = 0; place < across ** 2; place++) {
      const [top, left] = [Math.floor(place / across) * patch, (place % across) * patch];
      let sum = 0;
      for (let i = 0; i < patch ** 2; i++) sum += map[(top + Math.floor(i / patch)) * side + left + (i % patch)];
      const cell = sum / patch ** 2;
      this.largestCell = Math.max(this.largestCell, cell);
      this.background += 1 - cell;
      for (let d = 0; d < numFeatures; d++) this.features[d] += features[d * across ** 2 + place] * (1 - cell);
    }
    const { means } = this;
    for (let i = 0; i < map.length; i++) {
      const [row, column] = [Math.floor(i / side), i % side];
      this.histogram[Math.min(Math.floor(gray[i] * BINS), BINS - 1)]++;
      means.cells += map[i] / side ** 2;
      means.undecided += (map[i] * (1 - map[i])) / side ** 2;
      if (map[i] >= MIDDLE[0] && map[i] < MIDDLE[1]) means.middle += 1 / side ** 2;
      if (column === side - 1) continue;
      const right = gray[i + 1] - gray[i];
      means.texture += Math.abs(right) / (side * (side - 1));
      if (row < side - 1) means.edges += Math.hypot(right, gray[i + side] - gray[i]) / (side - 1) ** 2;
    }
    this.windows++;
  }

  measures() {
    const half = this.histogram.reduce((sum, count) => sum + count, 0) / 2;
    let [bin, below] = [0, this.histogram[0]];
    while (below < half) below += this.histogram[++bin];
    const { cells, undecided, middle, edges, texture } = this.means;
    return {
      background: (bin + 0.5) / BINS,
      undecided: undecided / Math.max(cells, 1e-9),
      middle: middle / this.windows,
      edges: edges / this.windows,
      texture: texture / this.windows,
    };
  }

  /** The nearest of the model's kinds: { unfamiliar, kind }; null where there is nothing to compare. */
  compare(kinds) {
    if (!this.features || (this.isNoise && this.largestCell <= CELL)) return null;
    const features = Array.from(this.features, (sum) => sum / Math.max(this.background, 1e-6));
    const measures = this.measures();
    const compared = kinds.map((kind) => {
      const scaled = COMPARED.filter((name) => name in kind.scales).map((name) => measures[name] * kind.scales[name]);
      return { unfamiliar: distance(kind, [...features, ...scaled]) / kind.limit, kind };
    });
    return compared.reduce((a, b) => (b.unfamiliar < a.unfamiliar ? b : a), compared[0] ?? null);
  }
}

/** From the third nearest training image. */
function distance(kind, point) {
  if (!kind.examples) throw new Error("The model is of an earlier version: export it again.");
  const bytes = Uint8Array.from(atob(kind.examples), (char) => char.charCodeAt(0));
  const halves = new DataView(bytes.buffer);
  const size = point.length;
  const squared = new Float64Array(bytes.length / 2 / size);
  for (let i = 0; i < squared.length * size; i++) {
    const k = i % size;
    const offset = point[k] - kind.mean[k] - float16(halves.getUint16(2 * i, true)) * kind.limit;
    squared[Math.floor(i / size)] += offset ** 2;
  }
  return Math.sqrt(squared.sort()[NEIGHBOR - 1]);
}

function float16(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
}
