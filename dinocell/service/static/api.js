// Requests to the service, and numpy files to typed arrays.

const BASE = "/api/v1";
const AWAY = "The service does not answer: is it running?";
const TYPES = {
  "|b1": Uint8Array, "|u1": Uint8Array, "|i1": Int8Array, "<u2": Uint16Array, "<i2": Int16Array,
  "<u4": Uint32Array, "<i4": Int32Array, "<f4": Float32Array, "<f8": Float64Array,
  "<u8": BigUint64Array, "<i8": BigInt64Array,
};

export class Problem extends Error {
  constructor(status, detail, retryAfter) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function setToken(token) {
  sessionStorage.setItem("token", token);
}

export const hasToken = () => Boolean(sessionStorage.getItem("token"));

// A token may come in the address, as http://host:8000/#token=...; it is not sent to the server that way.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  setToken(given);
  history.replaceState(null, "", location.pathname);
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let answer;
  if (/[^ -~]/.test(token)) throw new Problem(401, ""); // no header can hold it, and no token has such letters
  try {
    answer = await fetch(BASE + path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, AWAY);
  }
  if (answer.ok) return answer;
  // So says a proxy between, while the service is away; what waits for the service then waits on.
  if ([502, 503, 504].includes(answer.status)) throw new Problem(0, AWAY);
  let detail = answer.statusText;
  try {
    detail = (await answer.json()).detail || detail;
  } catch { /* no JSON: the status says it */ }
  throw new Problem(answer.status, detail, Number(answer.headers.get("retry-after")) || 0);
}

const json = async (path, options) => (await ask(path, options)).json();
const npy = async (path, options) => parseNpy(await (await ask(path, options)).arrayBuffer());

export const models = () => json("/models");
export const jobs = () => json("/jobs?limit=1000");
export const job = (id) => json(`/jobs/${id}`);
export const cells = (id) => json(`/jobs/${id}/cells`);
export const revision = (id) => json(`/jobs/${id}/labels`);
export const channels = (id) => json(`/jobs/${id}/channels`);
// Without a channel, the gray plane that was segmented.
export const image = (id, channel, signal) => npy(`/jobs/${id}/image${channel === null ? "" : `?channel=${channel}`}`, { signal });
export const labels = (id) => npy(`/jobs/${id}/labels/npy`);
const place = (level, row, column) => `tile?level=${level}&row=${row}&column=${column}`;
const MOST_CHANNELS = 16; // of one answer
// The pixels of a tile in each of some channels; null is the gray plane, which comes alone.
export async function imageTile(id, level, row, column, channels) {
  const found = [];
  for (let first = 0; first < channels.length; first += MOST_CHANNELS) {
    const chosen = channels.slice(first, first + MOST_CHANNELS).filter((one) => one !== null).map((one) => `&channel=${one}`);
    const answer = await ask(`/jobs/${id}/image/${place(level, row, column)}${chosen.join("")}`);
    const buffer = await answer.arrayBuffer();
    for (let at = 0; at < buffer.byteLength; at = found.at(-1).end) found.push(parseNpy(buffer, at));
  }
  return found.map(({ data }) => data);
}

export async function labelsTile(id, level, row, column) {
  const answer = await ask(`/jobs/${id}/labels/${place(level, row, column)}`);
  const { data } = parseNpy(await answer.arrayBuffer());
  return { data, revision: Number(answer.headers.get("etag").replaceAll('"', "")) };
}

export const remove = (id) => json(`/jobs/${id}`, { method: "DELETE" });

// `options` are those of the job: a list of `channels`, names or positions; `z`, `time`, `scene`.
export function upload(file, options) {
  const form = new FormData();
  for (const [name, value] of Object.entries(options)) for (const one of [value].flat()) form.append(name, one);
  form.append("image", file, file.name);
  return json("/jobs", { method: "POST", body: form });
}

const send = (path, body) => json(path, {
  method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
});

const PART = 4 * 2 ** 20; // bytes

export const beginUpload = (file, options) => send("/uploads", { name: file.name, bytes: file.size, ...options });
export const uploaded = (id) => json(`/uploads/${id}`);
export const sendPart = (id, file, offset) =>
  json(`/uploads/${id}?offset=${offset}`, { method: "PUT", body: file.slice(offset, offset + PART) });
export const finishUpload = (id) => json(`/uploads/${id}/finish`, { method: "POST" });
export const dropUpload = (id) => ask(`/uploads/${id}`, { method: "DELETE" });

export const relabel = (id, thresholds, revision, amend, pixels) =>
  send(`/jobs/${id}/relabel?revision=${revision}&amend=${amend}&pixels=${pixels}`, thresholds);
export const correct = (id, correction, revision, pixels) =>
  send(`/jobs/${id}/corrections?revision=${revision}&pixels=${pixels}`, correction);

export const learning = () => json("/learning");
export const learn = () => json("/learning", { method: "POST" });
export const discardLearned = () => json("/learning", { method: "DELETE" });
export const keepLearned = () => json("/learning/keep", { method: "POST" });
export const learningPicture = async (name) => (await ask(`/learning/pictures/${name}`)).blob();

// The labels of the box of pixels that a change has changed.
export async function pixelsOf(change) {
  const packed = Uint8Array.from(atob(change.labels), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint32Array(await new Response(stream).arrayBuffer());
}

export const download = (id, kind) => save(`/jobs/${id}/result/${kind}`, kind);
export const downloadAll = () => save("/results", "results.zip");

async function save(path, name) {
  const answer = await ask(path);
  const disposition = answer.headers.get("content-disposition") || "";
  const encoded = /filename\*=utf-8''([^;]+)/i.exec(disposition);
  const plain = /filename="([^"]+)"/.exec(disposition);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = encoded ? decodeURIComponent(encoded[1]) : plain ? plain[1] : name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// Calls `hear` with the job after each of its steps until it has ended.
export async function follow(id, hear) {
  const answer = await ask(`/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = /^data: (.*)$/m.exec(event);
      if (data) hear(JSON.parse(data[1]));
    }
  }
}

// The numpy file that begins `at` a byte; `end` is the byte after it.
export function parseNpy(buffer, at = 0) {
  const view = new DataView(buffer, at);
  const long = view.getUint8(6) > 1;
  const length = long ? view.getUint32(8, true) : view.getUint16(8, true);
  const start = at + (long ? 12 : 10) + length;
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, start - length, length));
  const type = /'descr': '([^']+)'/.exec(header)[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((s) => s.trim()).map(Number);
  if (!TYPES[type] || /'fortran_order': True/.test(header)) {
    throw new Problem(0, `Pixels of type ${type} cannot be shown`);
  }
  const bytes = TYPES[type].BYTES_PER_ELEMENT, count = shape.reduce((a, b) => a * b, 1), end = start + count * bytes;
  const data = start % bytes ? new TYPES[type](buffer.slice(start, end)) : new TYPES[type](buffer, start, count);
  const whole = type.endsWith("8") && type !== "<f8" ? Float64Array.from(data, Number) : data;
  return { data: whole, shape, end };
}
