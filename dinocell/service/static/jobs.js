// The list of images: uploads, their progress, the way from one to the next.

import * as api from "./api.js";
import { openJob } from "./result.js";
import { $, explained, guarded, page, say, worded } from "./state.js";
import { cellsOf, element } from "./table.js";

const GONE = ["deleted", "cancelled", "expired"];
const LARGE = 16 * 2 ** 20; // bytes; such files come in parts

const RESULT = /^(.+?)(?:_nuclei)?_(?:labels|overlay|distance_map)(?:_v\d+)?\.\w+$/; // of `segment`
let refused = 0; // files that the service has not taken
const FIELDS = [...$("segmented").querySelectorAll("input")];
const valueOf = ({ type, value, checked }) => (type === "checkbox" && !checked ? "" : value.trim());
const written = () => Object.fromEntries(FIELDS.map((field) => [field.name, valueOf(field)]).filter(([, value]) => value));

function empty(field) {
  if (field.type === "checkbox") field.checked = false;
  else field.value = "";
}

export async function add(files) {
  const fields = written();
  let given = JSON.stringify(fields);
  const options = { ...fields, channels: (fields.channels || "").split(",").map((name) => name.trim()).filter(Boolean) };
  for (const file of files) {
    for (;;) {
      try {
        say(`Uploading ${file.name}`);
        const job = await (file.size > LARGE ? inParts : api.upload)(file, options);
        if (!job) break; // cancelled
        noteJob(job);
        watch(job.id, true);
        // The next images may be gray, and no stacks.
        if (JSON.stringify(written()) === given) for (const field of FIELDS) empty(field);
        given = null; // what is written from now on is for the images after these
        const chosen = Object.entries(fields).map(([name, value]) => worded(name, value)).join(", ");
        say(chosen && `${file.name} is segmented with ${chosen}; write it again for other images`);
        break;
      } catch (error) {
        if (error.status !== 429) {
          await guarded(() => { throw error; });
          if (error.status === 401) return; // so would be the others
          noteRefused(file.name, error.message);
          break;
        }
        say(`The queue is full; ${file.name} waits`);
        await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter || 5)));
      }
    }
  }
}

function noteRefused(name, error) {
  noteJob({ id: `refused ${refused++}`, name, state: "failed", error, isHere: true });
}

// The images that are dropped, also those in folders; of a folder, only files that have a known suffix.
export async function addDropped({ items, files }) {
  const plain = [...files], entries = [...items].map((item) => item.webkitGetAsEntry()).filter(Boolean); // gone after the event
  if (!entries.length) return add(plain); // as from another page
  const own = [], found = [];
  for (const entry of entries) (entry.isFile ? own : found).push(...(await filesOf(entry)));
  return addFrom(found, own);
}

// Those files of folders that may be images, after `others`.
export function addFrom(found, others = []) {
  const suffixes = $("files").accept.split(","), tables = new Set(found.map(({ name }) => name));
  const images = found.filter(({ name, webkitRelativePath }) => {
    const [, stem] = RESULT.exec(name) || [];
    const isHidden = name[0] === "." || webkitRelativePath.includes("/.");
    return !isHidden && !tables.has(`${stem}_cells.csv`) && suffixes.some((suffix) => name.toLowerCase().endsWith(suffix));
  });
  if (!images.length && !others.length) say(`No image is in that folder: its files must end in one of ${suffixes.join(" ")}`);
  return add([...others, ...images]);
}

// The file of an entry, or those in a folder that are not hidden; the list says which cannot be read.
async function filesOf(entry) {
  try {
    return entry.isFile ? [await new Promise((done, fail) => entry.file(done, fail))] : await filesIn(entry);
  } catch {
    noteRefused(entry.name, "It cannot be read: check that it is still there, and that you may read it");
    return [];
  }
}

async function filesIn(folder) {
  const reader = folder.createReader(), entries = [], files = [];
  for (;;) { // at most 100 at a time
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    entries.push(...some);
  }
  entries.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  for (const entry of entries) if (entry.name[0] !== ".") files.push(...(await filesOf(entry)));
  return files;
}

// Upload a file in parts; continues where it was after a cut connection, and after the page was closed.
async function inParts(file, options) {
  const key = `upload ${JSON.stringify([file.name, file.size, file.lastModified, options])}`;
  const begun = localStorage.getItem(key);
  let upload = begun && (await api.uploaded(begun).catch(() => null));
  upload ||= await api.beginUpload(file, options);
  const { id } = upload;
  localStorage.setItem(key, id);
  noteJob({ ...upload, state: "uploading" });
  while (page.jobs.get(id).state === "uploading") {
    try {
      if (upload.offset === upload.bytes) {
        const job = await api.finishUpload(id);
        localStorage.removeItem(key);
        return job;
      }
      upload = await api.sendPart(id, file, upload.offset);
      say(`Uploading ${file.name}`);
    } catch (error) {
      if (![0, 408, 409, 429].includes(error.status)) {
        page.jobs.delete(id);
        drawJobs();
        throw error;
      }
      say(`The upload of ${file.name} continues when the service answers`);
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter || 2)));
      upload = await api.uploaded(id).catch(() => upload);
    }
    if (page.jobs.get(id).state === "uploading") noteJob({ ...upload, state: "uploading" });
  }
  await api.dropUpload(id).catch(() => {}); // cancelled; else the service deletes it later
  return null;
}

// Jobs are followed one by one, as they run: a browser has six connections to a server, for all its windows.
let watched = Promise.resolve();
export function watch(id, show) {
  watched = watched.then(() => watchOne(id, show)).catch(console.error);
}

// Follow a job until it has ended; a broken connection is tried again.
async function watchOne(id, show) {
  if (GONE.includes(page.jobs.get(id).state)) return;
  let isAway = false;
  const hear = (job) => {
    if (isAway) say("");
    isAway = false;
    noteJob(job);
  };
  for (let pause = 1000; ; pause = Math.min(2 * pause, 30000)) {
    try {
      await api.follow(id, hear);
    } catch (error) {
      if (error.status) return;
      isAway = true;
      say(`The service does not answer. ${page.jobs.get(id).name} continues when it does`);
    }
    const job = page.jobs.get(id);
    if (["done", "failed", ...GONE].includes(job.state)) {
      if (job.state === "done" && show) {
        if (page.asked) say(`The cells of ${job.name} are found`);
        else openJob(id);
      } else if (job.state === "failed" && show) sayWhy(job);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

export function noteJob(job) {
  page.jobs.set(job.id, job);
  drawJobs();
}

const lines = new Map(); // of the list, by the ids of their jobs

// Lines stay where they are, and so do the focus and a press that has begun.
export function drawJobs() {
  const list = $("job-list");
  const jobs = [...page.jobs.values()].reverse().filter((job) => !GONE.includes(job.state));
  for (const [id, line] of lines) {
    if (jobs.some((job) => job.id === id)) continue;
    const next = line.contains(document.activeElement) && (line.nextSibling || line.previousSibling);
    line.remove();
    lines.delete(id);
    next?.firstChild?.focus();
  }
  jobs.forEach((job, place) => {
    if (!lines.has(job.id)) lines.set(job.id, lineOf(job));
    const line = lines.get(job.id);
    if (list.children[place] !== line) list.insertBefore(line, list.children[place] || null);
    drawLine(line, job);
  });
  $("download-all").hidden = [...page.jobs.values()].filter((job) => job.state === "done").length < 2;
}

function lineOf({ id, name }) {
  const line = element("li");
  const button = line.appendChild(element("button"));
  Object.assign(button, { type: "button" }).dataset.id = id;
  button.append(element("span", name), element("span"), element("progress"));
  button.firstChild.className = "name";
  button.firstChild.title = name;
  button.lastChild.setAttribute("aria-label", `Progress of ${name}`);
  button.addEventListener("click", () => {
    const job = page.jobs.get(id);
    if (job.state === "done") openJob(id);
    else if (job.state === "failed") sayWhy(job);
    else drop(job);
  });
  const remove = line.appendChild(element("button", "×"));
  Object.assign(remove, { type: "button", className: "remove", title: "Remove from the list" });
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.addEventListener("click", () => drop(page.jobs.get(id)));
  return line;
}

function drawLine(line, job) {
  const [button, remove] = line.children, [, state, bar] = button.children;
  const failed = job.state === "failed", text = stateOf(job);
  if (page.open?.id === job.id) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
  if (state.textContent !== text) state.textContent = text;
  state.className = failed ? "quiet failed" : "quiet";
  remove.hidden = !failed;
  bar.hidden = !["uploading", "running", "queued"].includes(job.state);
  const [value, max] = job.state === "uploading" ? [job.offset, job.bytes] : [job.windows_done, job.windows_total];
  if (max) Object.assign(bar, { max, value });
  else if (job.state === "queued") bar.value = 0;
  else bar.removeAttribute("value");
}

const sayWhy = (job) => say(`${job.name}: ${explained(job.error)}`);

function stateOf(job) {
  if (job.state === "uploading") return `uploading, ${Math.floor((100 * job.offset) / job.bytes)} % · click cancels`;
  if (job.state === "done") return cellsOf(job.summary.num_cells);
  if (job.state === "failed") return job.error;
  if (job.state === "queued") return job.waiting_before ? `${job.waiting_before} before it · click cancels` : "waits · click cancels";
  return job.windows_total ? `${Math.round((100 * job.windows_done) / job.windows_total)} % · click cancels` : "starts";
}

async function drop(job) {
  await guarded(async () => {
    noteJob(job.state === "uploading" || job.isHere ? { ...job, state: "cancelled" } : await api.remove(job.id));
  });
}

// Open the image `step` places further down in the list.
export function neighbour(step) {
  const ids = [...page.jobs.values()].reverse().filter((job) => job.state === "done").map((job) => job.id);
  const next = ids[ids.indexOf(page.open?.id) + step];
  if (next) openJob(next);
}

$("download-all").addEventListener("click", () => guarded(async () => {
  say("Collecting the results of all images");
  await api.downloadAll();
  say("");
}));
