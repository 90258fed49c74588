// The list of images: uploads, their progress, the way from one to the next.

import * as api from "./api.js";
import { openJob } from "./result.js";
import { $, guarded, page, say } from "./state.js";
import { element } from "./table.js";

const GONE = ["deleted", "cancelled", "expired"];
const LARGE = 16 * 2 ** 20; // bytes; such files come in parts

const FIELDS = [...$("segmented").querySelectorAll("input")];
const written = () => Object.fromEntries(FIELDS.map(({ name, value }) => [name, value.trim()]).filter(([, value]) => value));

export async function add(files) {
  const fields = written(), given = JSON.stringify(fields);
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
        if (JSON.stringify(written()) === given) for (const field of FIELDS) field.value = "";
        const chosen = Object.entries(fields).map(([name, value]) => `${name} ${value}`).join(", ");
        say(chosen && `${file.name} is segmented with ${chosen}; write it again for other images`);
        break;
      } catch (error) {
        if (error.status !== 429) {
          await guarded(() => { throw error; });
          break;
        }
        say(`The queue is full; ${file.name} waits`);
        await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter || 5)));
      }
    }
  }
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

// Follow a job until it has ended; a broken connection is tried again.
export async function watch(id, show) {
  for (let pause = 1000; ; pause = Math.min(2 * pause, 30000)) {
    try {
      await api.follow(id, noteJob);
    } catch (error) {
      if (error.status) return;
    }
    const job = page.jobs.get(id);
    if (["done", "failed", ...GONE].includes(job.state)) {
      if (job.state === "done" && show) {
        if (page.asked) say(`The cells of ${job.name} are found`);
        else openJob(id);
      }
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

export function noteJob(job) {
  page.jobs.set(job.id, job);
  drawJobs();
}

export function drawJobs() {
  const list = $("job-list");
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const lines = [];
  for (const job of [...page.jobs.values()].reverse()) {
    if (GONE.includes(job.state)) continue;
    const line = element("li");
    const button = line.appendChild(element("button"));
    button.type = "button";
    button.dataset.id = job.id;
    if (page.open?.id === job.id) button.setAttribute("aria-current", "true");
    const name = button.appendChild(element("span", job.name));
    name.className = "name";
    name.title = job.name;
    const state = button.appendChild(element("span", stateOf(job)));
    state.className = job.state === "failed" ? "quiet failed" : "quiet";
    if (["uploading", "running", "queued"].includes(job.state)) {
      const bar = button.appendChild(element("progress"));
      bar.setAttribute("aria-label", `Progress of ${job.name}`);
      if (job.state === "uploading") {
        bar.max = job.bytes;
        bar.value = job.offset;
      } else if (job.windows_total) {
        bar.max = job.windows_total;
        bar.value = job.windows_done;
      } else if (job.state === "queued") bar.value = 0;
    }
    button.addEventListener("click", () => (job.state === "done" ? openJob(job.id) : drop(job)));
    lines.push(line);
  }
  list.replaceChildren(...lines);
  $("download-all").hidden = [...page.jobs.values()].filter((job) => job.state === "done").length < 2;
  if (focused) list.querySelector(`[data-id="${focused}"]`)?.focus();
}

function stateOf(job) {
  if (job.state === "uploading") return `uploading, ${Math.floor((100 * job.offset) / job.bytes)} % · click cancels`;
  if (job.state === "done") return `${job.summary.num_cells} cells`;
  if (job.state === "failed") return job.error;
  if (job.state === "queued") return job.waiting_before ? `${job.waiting_before} before it · click cancels` : "waits · click cancels";
  return job.windows_total ? `${Math.round((100 * job.windows_done) / job.windows_total)} % · click cancels` : "starts";
}

async function drop(job) {
  await guarded(async () => {
    noteJob(job.state === "uploading" ? { ...job, state: "cancelled" } : await api.remove(job.id));
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
