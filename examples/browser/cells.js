// Distance map to labels: markers by persistence, then a seeded flood.  The algorithms, and why they are right, are
// described in dinocell/segmentation/markers.py and watershed.py; the labels are the same, number by number.

const NUM_LEVELS = 4096;

/** Labels (Uint32Array, 0 background, cells 1..n in reading order of their peaks) of a map in [0, 1]. */
export function separateCells(map, width, height, thresholds) {
  const frame = width + 2; // a frame of one pixel spares checks of bounds
  const levels = new Int16Array(frame * (height + 2)).fill(-1);
  const fill = Math.fround(thresholds.fill_threshold);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const value = map[row * width + column];
      if (value > fill) {
        levels[(row + 1) * frame + column + 1] = rint(Math.fround(Math.min(value, 1) * (NUM_LEVELS - 1)));
      }
    }
  }
  const peaks = findPeaks(levels, frame, thresholds);
  const grown = flood(levels, frame, peaks);
  const areas = new Uint32Array(peaks.length + 1);
  for (const label of grown) areas[label]++;
  const numbers = new Uint32Array(areas.length);
  let count = 0;
  for (let label = 1; label < areas.length; label++) {
    if (areas[label] >= Math.max(thresholds.min_area_px, 1)) numbers[label] = ++count;
  }
  const labels = new Uint32Array(width * height);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      labels[row * width + column] = numbers[grown[(row + 1) * frame + column + 1]];
    }
  }
  return labels;
}

/** Nearest integer, halves to the even one. */
function rint(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
}

/** Positions of the peaks that are cells, ascending. */
function findPeaks(levels, frame, thresholds) {
  const top = NUM_LEVELS - 1;
  const peakLevel = Math.floor(thresholds.peak_threshold * top) + 1;
  const rise = thresholds.min_prominence * top;
  const basinOf = climb(levels, frame);
  const numBasins = basinOf.reduce((most, basin) => Math.max(most, basin), 0);
  const peak = new Int32Array(numBasins + 1).fill(-1);
  const heightOf = new Int16Array(numBasins + 1).fill(-1);
  levels.forEach((level, index) => {
    const basin = basinOf[index];
    if (basin && level > heightOf[basin]) [heightOf[basin], peak[basin]] = [level, index];
  });
  const passes = sortedPasses(levels, frame, basinOf);
  const parent = Int32Array.from({ length: numBasins + 1 }, (_, basin) => basin);
  const isMarker = new Uint8Array(numBasins + 1);
  const find = (basin) => {
    while (parent[basin] !== basin) basin = parent[basin] = parent[parent[basin]];
    return basin;
  };
  for (const { level, from, to } of passes) {
    let [high, low] = [find(from), find(to)];
    if (high === low) continue;
    if (heightOf[low] > heightOf[high] || (heightOf[low] === heightOf[high] && peak[low] < peak[high])) {
      [high, low] = [low, high];
    }
    const above = heightOf[low] - level;
    isMarker[low] = heightOf[low] >= peakLevel && above >= rise && above > 0 ? 1 : 0;
    parent[low] = high;
  }
  const peaks = [];
  for (let basin = 1; basin <= numBasins; basin++) {
    if (find(basin) === basin) isMarker[basin] = heightOf[basin] >= peakLevel ? 1 : 0;
    if (isMarker[basin]) peaks.push(peak[basin]);
  }
  return peaks.sort((a, b) => a - b);
}

/** The basin, from 1, in which each pixel's way up ends; 0 outside.  Of equal neighbours the first is the higher. */
function climb(levels, frame) {
  const above = new Int32Array(levels.length).fill(-1);
  for (let index = frame; index < levels.length - frame; index++) {
    let highest = levels[index];
    if (highest < 0) continue;
    let best = index;
    if (levels[index - frame] >= highest) [best, highest] = [index - frame, levels[index - frame]];
    if (levels[index - 1] > highest || (best === index && levels[index - 1] === highest)) {
      [best, highest] = [index - 1, levels[index - 1]];
    }
    if (levels[index + 1] > highest) [best, highest] = [index + 1, levels[index + 1]];
    if (levels[index + frame] > highest) best = index + frame;
    above[index] = best;
  }
  const basinOf = new Int32Array(levels.length);
  let numBasins = 0;
  const way = [];
  for (let first = 0; first < above.length; first++) {
    let index = first;
    if (above[index] < 0) continue;
    way.length = 0;
    while (!basinOf[index] && above[index] !== index) {
      way.push(index);
      index = above[index];
    }
    if (!basinOf[index]) basinOf[index] = ++numBasins;
    for (const step of way) basinOf[step] = basinOf[index];
  }
  return basinOf;
}

/** Neighbouring pixels of two basins, the highest pair first, in reading order among equals. */
function sortedPasses(levels, frame, basinOf) {
  const byLevel = Array.from({ length: NUM_LEVELS }, () => []);
  for (let index = frame; index < levels.length - frame; index++) {
    const from = basinOf[index];
    if (!from) continue;
    for (const step of [1, frame]) {
      const to = basinOf[index + step];
      if (to && to !== from) {
        const level = Math.min(levels[index], levels[index + step]);
        byLevel[level].push({ level, from, to });
      }
    }
  }
  return byLevel.reverse().flat();
}

/** Grow the peaks downhill, the highest pixel that was reached first; each level is a queue. */
function flood(levels, frame, peaks) {
  const labels = new Uint32Array(levels.length);
  const queues = Array.from({ length: NUM_LEVELS }, () => []);
  const taken = new Uint32Array(NUM_LEVELS);
  let current = -1;
  peaks.forEach((index, number) => {
    labels[index] = number + 1;
    queues[levels[index]].push(index);
    current = Math.max(current, levels[index]);
  });
  while (current >= 0) {
    if (taken[current] === queues[current].length) {
      current--;
      continue;
    }
    const index = queues[current][taken[current]++];
    for (const step of [-frame, -1, 1, frame]) {
      const neighbour = index + step;
      const level = levels[neighbour];
      if (level < 0 || labels[neighbour]) continue;
      labels[neighbour] = labels[index];
      queues[level].push(neighbour);
      current = Math.max(current, level);
    }
  }
  return labels;
}
