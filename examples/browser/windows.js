// The grid of overlapping windows over an image, and their blending (dinocell/segmentation/tiles.py).

/** Run `predict` (window: Float32Array → map: Float32Array) over an image and blend the maps into one. */
export async function predictWindows(gray, width, height, config, predict) {
  const { window_px: side, overlap_px: overlap } = config;
  const [rows, columns] = [starts(height, side, overlap), starts(width, side, overlap)];
  const rowShares = shares(rows, height, side, overlap);
  const columnShares = shares(columns, width, side, overlap);
  const blended = new Float32Array(width * height);
  const window = new Float32Array(side * side);
  for (let r = 0; r < rows.length; r++) {
    for (let c = 0; c < columns.length; c++) {
      for (let i = 0; i < side; i++) {
        const row = reflected(rows[r] + i, height) * width;
        for (let j = 0; j < side; j++) window[i * side + j] = gray[row + reflected(columns[c] + j, width)];
      }
      const map = await predict(window);
      for (let i = Math.max(-rows[r], 0); i < Math.min(side, height - rows[r]); i++) {
        for (let j = Math.max(-columns[c], 0); j < Math.min(side, width - columns[c]); j++) {
          const share = Math.fround(rowShares[r][i] * columnShares[c][j]);
          blended[(rows[r] + i) * width + columns[c] + j] += Math.fround(share * map[i * side + j]);
        }
      }
    }
  }
  return blended.map((value) => Math.min(Math.max(value, 0), 1));
}

function starts(size, side, overlap) {
  const room = size - side;
  if (room <= 0) return [Math.floor(room / 2)];
  const steps = Math.ceil(room / (side - overlap));
  return Array.from({ length: steps + 1 }, (_, i) => Math.floor((i * room) / steps));
}

/** For each window, the share of each of its positions in the average: raised cosines that add up to 1. */
function shares(starts, size, side, overlap) {
  const ramp = new Float64Array(side).fill(1);
  for (let i = 0; i < overlap; i++) {
    ramp[i] = ramp[side - 1 - i] = Math.sin(((Math.PI / 2) * (i + 0.5)) / overlap) ** 2;
  }
  const total = new Float64Array(size);
  const inside = (start, i) => start + i >= 0 && start + i < size;
  for (const start of starts) ramp.forEach((value, i) => inside(start, i) && (total[start + i] += value));
  return starts.map((start) => Float32Array.from(ramp, (value, i) => (inside(start, i) ? value / total[start + i] : 0)));
}

function reflected(position, size) {
  if (size === 1) return 0;
  const period = 2 * (size - 1);
  const place = ((position % period) + period) % period;
  return Math.min(place, period - place);
}
