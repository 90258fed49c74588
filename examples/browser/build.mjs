// Copy what the page needs beside it: the runtime, the reader of TIFF, and the model.
//   node build.mjs [MODEL.onnx]

import { copyFileSync, mkdirSync } from "node:fs";

const modules = "node_modules";
const files = {
  "ort.mjs": `${modules}/onnxruntime-web/dist/ort.wasm.bundle.min.mjs`,
  "ort-wasm-simd-threaded.wasm": `${modules}/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm`,
  "geotiff.js": `${modules}/geotiff/dist-browser/geotiff.js`,
  "geotiff-LICENSE": `${modules}/geotiff/LICENSE`,
  "model.onnx": process.argv[2] ?? "../../dinocell/models/dinocell-fast.onnx",
};
mkdirSync("vendor", { recursive: true });
for (const [name, source] of Object.entries(files)) copyFileSync(source, `vendor/${name}`);
