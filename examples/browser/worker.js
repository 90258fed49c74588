// Image file in, labels out, beside the page: the steps of `dinocell segment`.

import { separateCells } from "./cells.js";
import { normalize, readImage } from "./image.js";
import { Appearance } from "./kinds.js";
import * as ort from "./vendor/ort.mjs";
import { predictWindows } from "./windows.js";

ort.env.wasm.numThreads = 1; // threads need headers of the server
ort.env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };

/** The header that `dinocell export` wrote: the entry `dinocell` of the metadata, which onnxruntime-web does not show. */
function readHeader(bytes) {
  const text = new TextDecoder();
  const fields = function* (start, end) {
    let at = start;
    const varint = () => {
      for (let value = 0, shift = 1; ; shift *= 128) {
        const byte = bytes[at++];
        value += (byte & 127) * shift;
        if (byte < 128) return value;
      }
    };
    while (at < end) {
      const tag = varint();
      const value = varint(); // all fields of a model are numbers or have a length
      if (tag % 8 === 2) yield [Math.floor(tag / 8), at, (at += value)];
    }
  };
  const METADATA = 14;
  for (const [field, start, end] of fields(0, bytes.length)) {
    if (field !== METADATA) continue;
    const [key, value] = [...fields(start, end)].map(([, from, to]) => text.decode(bytes.subarray(from, to)));
    if (key === "dinocell") return JSON.parse(value);
  }
  throw new Error("vendor/model.onnx has no header of `dinocell export`.");
}

const ready = (async () => {
  const response = await fetch(new URL("./vendor/model.onnx", import.meta.url));
  if (!response.ok) throw new Error("vendor/model.onnx is missing: run `npm run build`.");
  const bytes = new Uint8Array(await response.arrayBuffer());
  return { header: readHeader(bytes), session: await ort.InferenceSession.create(bytes) };
})();
ready.catch(() => {}); // shown with the first image

async function segment(file) {
  const { header, session } = await ready;
  const config = header.model;
  const image = await readImage(file);
  const { width, height } = image;
  const { gray, isNoise } = normalize(image, config);
  const appearance = new Appearance(isNoise);
  const side = config.window_px;
  const predict = async (window) => {
    const { map, features } = await session.run({ gray: new ort.Tensor("float32", window, [1, 1, side, side]) });
    if (window.some((value) => value)) appearance.add(window, map.data, side, features.data, config.patch_size);
    return map.data;
  };
  const started = performance.now();
  const isBlank = gray.every((value) => value === 0);
  const map = isBlank ? gray : await predictWindows(gray, width, height, config, predict);
  const found = appearance.compare(header.statistics ?? []);
  const kind = found && found.unfamiliar <= 1 ? found.kind : null;
  const labels = separateCells(map, width, height, { ...config, ...kind?.thresholds });
  return {
    ...{ width, height, gray, map, labels },
    model: header.card.name,
    kind: kind?.name ?? "",
    unfamiliar: found?.unfamiliar ?? null,
    seconds: (performance.now() - started) / 1000,
  };
}

self.onmessage = async ({ data: { id, file } }) => {
  try {
    self.postMessage({ id, result: await segment(file) });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};
