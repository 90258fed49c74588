// The start of the page: dropped files, the token, the images that the service has.

import * as api from "./api.js";
import "./corrections.js";
import { add, addDropped, addFrom, drawJobs, neighbour, watch } from "./jobs.js";
import "./keys.js";
import { greyOut, hovered, openJob } from "./result.js";
import { $, guarded, page, say, view } from "./state.js";

view.onHover = hovered;
$("zoom-in").addEventListener("click", () => view.zoom(1.25));
$("zoom-out").addEventListener("click", () => view.zoom(0.8));
$("zoom-fit").addEventListener("click", () => view.fit());
$("files").addEventListener("change", () => {
  add([...$("files").files]);
  $("files").value = "";
});
$("choose-folder").addEventListener("click", () => $("folder").click());
$("folder").addEventListener("change", () => {
  addFrom([...$("folder").files]);
  $("folder").value = "";
});

let entered = 0;
document.addEventListener("dragenter", (event) => {
  event.preventDefault();
  entered += 1;
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => {
  entered -= 1;
  if (!entered) document.body.classList.remove("dropping");
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  entered = 0;
  document.body.classList.remove("dropping");
  if (page.takesImages) guarded(() => addDropped(event.dataTransfer));
});

async function start(entered = false) {
  await guarded(async () => {
    const models = api.models();
    if (entered) await models; // a token that was just entered may be wrong, and counts once
    const [[model], jobs] = await Promise.all([models, api.jobs()]);
    $("model").textContent = model.device ? `${model.name} on ${model.device}` : model.name;
    greyOut(model.missing_formats);
    $("drop").hidden = $("choose-folder").hidden = $("segmented").hidden = $("delete-job").hidden = !(page.takesImages = model.takes_images);
    for (const job of jobs.reverse()) {
      page.jobs.set(job.id, job);
      if (job.state === "queued" || job.state === "running") watch(job.id, false);
    }
    drawJobs();
    const last = sessionStorage.getItem("open");
    if (page.asked) { /* an image of before the token */ } else if (page.jobs.get(last)?.state === "done") openJob(last);
    else neighbour(1); // the newest one
    $("token-form").hidden = true;
    if (entered) say(""); // else what stands there is about images that were chosen meanwhile
  });
}
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setToken($("token").value);
  start(true);
});
start();
