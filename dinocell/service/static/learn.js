// Learning from corrections: start, progress, before and after, keep or discard.

import * as api from "./api.js";
import { $, guarded } from "./state.js";
import { cellsOf, element } from "./table.js";

let timer = 0;

// Look at the state of learning; again soon while it runs.
export async function showLearning() {
  clearTimeout(timer);
  try {
    draw(await api.learning());
  } catch { /* the service is away: the next look may find it */ }
}

const act = (work) => () => guarded(async () => draw(await work()));

function draw(state) {
  const { images, needed } = state;
  const running = state.state === "running", done = state.state === "done";
  $("learn").hidden = running || done;
  $("learn").disabled = images < needed;
  $("learn-stop").hidden = !running;
  $("learn-keep").hidden = $("learn-discard").hidden = !done;
  $("learn-progress").hidden = !running;
  if (state.total) {
    $("learn-progress").max = state.total;
    $("learn-progress").value = state.done;
  } else $("learn-progress").removeAttribute("value");
  $("learn-note").textContent = noteOf(state);
  drawPictures(done ? state : null);
  if (running) timer = setTimeout(showLearning, 2000);
}

function noteOf(state) {
  const { images, needed } = state;
  if (state.state === "running") return `${state.note}. You can go on correcting.`;
  if (state.state === "failed") return `Learning failed: ${state.error}`;
  if (state.state === "done") {
    return state.chosen === "start"
      ? "No training was better than the model as it is. You can discard the result."
      : `Tested on ${state.held_out}, which was not learned from. Keep the new model if it is better.`;
  }
  const count = `${images} ${images === 1 ? "image is" : "images are"} corrected`;
  if (images < needed) {
    const more = needed - images, are = images === 1 ? "one is" : `${images} are`;
    return `Correct all cells of ${more} ${images ? "more " : ""}${more === 1 ? "image" : "images"}, then press Learn: ` +
      `it learns from all but the last one, which tests the result (so far ${images ? are : "none is"} corrected).`;
  }
  const advice = "The one that you corrected last tests the result. What is wrong in the others is learned, too.";
  return state.note ? `${state.note}. ${count}.` : `${count}. ${advice}`;
}

async function drawPictures(state) {
  const place = $("learn-pictures");
  if (!state) {
    place.replaceChildren();
    return;
  }
  if (place.childElementCount) return;
  const figures = [];
  for (const [name, title] of [["truth", "Your cells"], ["before", "Before"], ["after", "After"]]) {
    const figure = element("figure");
    const picture = figure.appendChild(element("img"));
    picture.src = URL.createObjectURL(await api.learningPicture(name));
    const scores = state[name];
    const text = scores ? `${title}: ${cellsOf(scores.num_cells)}, AP ${scores.ap50.toFixed(3)} at IoU 0.5, ${scores.ap.toFixed(3)} on average` : title;
    picture.alt = `${state.held_out}. ${text}`;
    figure.append(element("figcaption", text));
    figures.push(figure);
  }
  place.replaceChildren(...figures);
}

$("learn").addEventListener("click", act(api.learn));
$("learn-stop").addEventListener("click", act(api.discardLearned));
$("learn-discard").addEventListener("click", act(api.discardLearned));
$("learn-keep").addEventListener("click", () => guarded(async () => {
  draw(await api.keepLearned());
  const [model] = await api.models();
  $("model").textContent = `${model.name} on ${model.device}`;
}));
