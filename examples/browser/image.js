// Files to gray images in [0, 1], as `dinocell segment` scales them.
//
// Left out, and so the difference from the program: what keeps scale bars, hot pixels and few very bright places from
// setting the contrast (dinocell/segmentation/intensity.py).

import "./vendor/geotiff.js";

/** Planes of an image file: TIFF with one page of integers, or 8-bit pictures that the browser knows.
 *
 * Returns { width, height, planes: typed arrays, integer }; one plane of a gray picture, three of a coloured one.
 */
export async function readImage(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const start = String.fromCharCode(bytes[0], bytes[1]);
  return start === "II" || start === "MM" ? readTiff(bytes.buffer) : readPicture(file);
}

async function readTiff(buffer) {
  const tiff = await GeoTIFF.fromArrayBuffer(buffer);
  if ((await tiff.getImageCount()) !== 1) throw new Error("The TIFF has several pages: give a file with one.");
  const image = await tiff.getImage();
  const planes = await image.readRasters();
  if (![1, 3].includes(planes.length)) throw new Error(`The TIFF has ${planes.length} channels: give one of them.`);
  if (planes[0] instanceof Float32Array && planes.some((plane) => !plane.every(Number.isFinite))) {
    throw new Error("The TIFF holds NaN or infinite values: replace them first.");
  }
  return { width: image.getWidth(), height: image.getHeight(), planes: [...planes] };
}

async function readPicture(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const planes = [0, 1, 2].map((channel) => Uint8Array.from({ length: width * height }, (_, i) => rgba[4 * i + channel]));
  const gray = planes[0].every((value, i) => value === planes[1][i] && value === planes[2][i]);
  return { width, height, planes: gray ? planes.slice(0, 1) : planes };
}

/** The mean of all planes, each mapped to [0, 1]: { gray: Float32Array, isNoise }. */
export function normalize({ width, height, planes }, config) {
  const ranges = planes.map((plane) => findRange(plane, width, height, config));
  const gray = new Float32Array(width * height);
  const scaled = planes.map((plane, k) => scale(plane, ranges[k]));
  for (let i = 0; i < gray.length; i++) {
    let sum = 0;
    for (const plane of scaled) sum = Math.fround(sum + plane[i]);
    gray[i] = sum / planes.length;
  }
  // Of the mean of several planes the program looks at the range of the mean again.
  const [last] = planes.length === 1 ? ranges : [findRange(gray, width, height, config)];
  const isNoise = last.high - last.low < 1.2 * config.min_contrast_sigma * last.noise;
  return { gray: planes.length === 1 ? gray : scale(gray, last), isNoise };
}

function findRange(plane, width, height, config) {
  const sorted = plane.slice().sort();
  let low = percentile(sorted, config.low_percentile);
  let high = percentile(sorted, config.high_percentile);
  if (high <= low) [low, high] = [sorted[0], sorted[sorted.length - 1]];
  if (high <= low) return { low, high: low, noise: 0 };
  const noise = estimateNoise(plane, width, height);
  return { low, high: low + Math.max(high - low, config.min_contrast_sigma * noise), noise };
}

function percentile(sorted, percent) {
  const place = (percent / 100) * (sorted.length - 1);
  const before = Math.floor(place);
  const after = Math.min(before + 1, sorted.length - 1);
  return sorted[before] + (sorted[after] - sorted[before]) * (place - before);
}

/** Standard deviation of the pixel noise: the median response to a Laplacian difference (Immerkær 1996). */
function estimateNoise(plane, width, height) {
  const clamp = (place, size) => Math.min(Math.max(place, 0), size - 1);
  const response = new Float32Array(plane.length);
  const weights = [1, -2, 1];
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      let sum = 0;
      for (let i = 0; i < 3; i++) {
        for (let j = 0; j < 3; j++) {
          const value = plane[clamp(row + i - 1, height) * width + clamp(column + j - 1, width)];
          sum += weights[i] * weights[j] * value;
        }
      }
      response[row * width + column] = Math.abs(sum);
    }
  }
  response.sort();
  const noise = percentile(response, 50) / 0.6745 / 6;
  const isInteger = !(plane instanceof Float32Array || plane instanceof Float64Array);
  return isInteger ? Math.max(noise, 12 ** -0.5) : noise;
}

function scale(plane, { low, high }) {
  const scaled = new Float32Array(plane.length);
  if (high <= low) return scaled;
  const start = Math.fround(low);
  const span = Math.fround(high - low);
  for (let i = 0; i < plane.length; i++) {
    const value = Math.fround(Math.fround(Math.fround(plane[i]) - start) / span);
    scaled[i] = Math.min(Math.max(value, 0), 1);
  }
  return scaled;
}
