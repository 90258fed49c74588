// Which training images an image resembles, and so which thresholds suit it (dinocell/network/familiarity.py).

const CELL = 0.5; // mean of the map over a patch in which the network sees a cell

/** Sums over windows of the features outside cells. */
export class Appearance {
  constructor(isNoise) {
    Object.assign(this, { isNoise, largestCell: 0, background: 0, sums: null });
  }

  /** Add a window: map (side × side), features (D × h × w) of patches of `patch` px. */
  add(map, side, features, patch) {
    const across = side / patch;
    const numFeatures = features.length / across ** 2;
    this.sums ??= new Float64Array(numFeatures);
    for (let place = 0; place < across ** 2; place++) {
      const [top, left] = [Math.floor(place / across) * patch, (place % across) * patch];
      let sum = 0;
      for (let i = 0; i < patch ** 2; i++) sum += map[(top + Math.floor(i / patch)) * side + left + (i % patch)];
      const cell = sum / patch ** 2;
      this.largestCell = Math.max(this.largestCell, cell);
      this.background += 1 - cell;
      for (let d = 0; d < numFeatures; d++) this.sums[d] += features[d * across ** 2 + place] * (1 - cell);
    }
  }

  /** The nearest of the model's kinds: { unfamiliar, kind }; null where there is nothing to compare. */
  compare(kinds) {
    if (!this.sums || (this.isNoise && this.largestCell <= CELL)) return null;
    const mean = this.sums.map((sum) => sum / Math.max(this.background, 1e-6));
    const compared = kinds.map((kind) => ({ unfamiliar: distance(kind, mean) / kind.limit, kind }));
    return compared.reduce((a, b) => (b.unfamiliar < a.unfamiliar ? b : a));
  }
}

/** Mahalanobis distance: the stored directions with their variances, the rest with one. */
function distance(kind, features) {
  const offset = features.map((value, i) => value - kind.mean[i]);
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const along = kind.directions.map((direction) => dot(direction, offset));
  const across = Math.max(dot(offset, offset) - dot(along, along), 0);
  return Math.sqrt(along.reduce((sum, value, i) => sum + value ** 2 / kind.variances[i], across / kind.rest));
}
