// The page: sends files to the worker, draws outlines, offers the labels.

const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let last = 0;

worker.onmessage = ({ data: { id, result, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  error ? reject(new Error(error)) : resolve(result);
};

/** Cells of an image file: { width, height, gray, map, labels, model, kind, unfamiliar, seconds }. */
export function segment(file) {
  return new Promise((resolve, reject) => {
    waiting.set(++last, { resolve, reject });
    worker.postMessage({ id: last, file });
  });
}

function draw(canvas, { width, height, gray, labels }) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < labels.length; i++) {
    const value = 255 * gray[i];
    const column = i % width;
    const border =
      labels[i] &&
      ((column > 0 && labels[i - 1] !== labels[i]) ||
        (column < width - 1 && labels[i + 1] !== labels[i]) ||
        (i >= width && labels[i - width] !== labels[i]) ||
        (i + width < labels.length && labels[i + width] !== labels[i]));
    pixels.data.set(border ? [255, 190, 0, 255] : [value, value, value, 255], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
}

/** A TIFF of 32-bit labels, without compression. */
function labelsToTiff({ width, height, labels }) {
  const SHORT = 3;
  const LONG = 4;
  const entries = [
    [256, LONG, width],
    [257, LONG, height],
    [258, SHORT, 32], // bits
    [259, SHORT, 1], // no compression
    [262, SHORT, 1], // 0 is black
    [273, LONG, 0], // where the pixels begin
    [277, SHORT, 1], // one channel
    [278, LONG, height], // one strip
    [279, LONG, 4 * labels.length],
  ];
  const start = 8 + 2 + 12 * entries.length + 4;
  const view = new DataView(new ArrayBuffer(start + 4 * labels.length));
  view.setUint32(0, 0x49492a00); // "II", 42
  view.setUint32(4, 8, true);
  view.setUint16(8, entries.length, true);
  entries.forEach(([tag, type, value], i) => {
    const at = 10 + 12 * i;
    view.setUint16(at, tag, true);
    view.setUint16(at + 2, type, true);
    view.setUint32(at + 4, 1, true);
    view.setUint32(at + 8, tag === 273 ? start : value, true);
  });
  labels.forEach((label, i) => view.setUint32(start + 4 * i, label, true));
  return new Blob([view], { type: "image/tiff" });
}

async function show(file) {
  const [status, link] = ["status", "download"].map((id) => document.getElementById(id));
  status.textContent = `${file.name} …`;
  link.hidden = true;
  try {
    const result = await segment(file);
    draw(document.getElementById("picture"), result);
    const cells = result.labels.reduce((most, label) => Math.max(most, label), 0);
    const kind = result.kind ? `, looks like ${result.kind}` : "";
    const note = result.unfamiliar > 1 ? "; the model does not know such images: check the cells" : "";
    status.textContent = `${file.name}: ${cells} cells in ${result.seconds.toFixed(1)} s (${result.model}${kind})${note}`;
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(labelsToTiff(result));
    link.download = `${file.name.replace(/\.[^.]*$/, "")}_labels.tif`;
    link.hidden = false;
  } catch (error) {
    status.textContent = `${file.name}: ${error.message}`;
  }
}

document.getElementById("file").addEventListener("change", (event) => {
  if (event.target.files.length) show(event.target.files[0]);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) show(event.dataTransfer.files[0]);
});
