// What the parts of the page share: the images, the one that is open, the picture, the table, messages.

import * as api from "./api.js";
import { Plot } from "./plot.js";
import { Table } from "./table.js";
import { View } from "./view.js";

export const $ = (id) => document.getElementById(id);

// `open`: { id, height, width, labels, numbers (of the rows of the table), revision, thresholds, ... }
// `asked`: the id of the image that was asked for last; `left` aborts requests for its pixels until it is open
export const page = { jobs: new Map(), open: null, asked: null, left: null, takesImages: true };
export const view = new View($("canvas"));
export const table = new Table($("table"));
export const plot = new Plot($("plot"), $("plot-across"), $("plot-up"));

const WORDS = {
  diameter_px: (value) => `cells of ${value} px`,
  pixel_size_um: (value) => `pixels of ${value} µm`,
  allow_mask: () => "even if it looks like labels",
};

// An option of a job as a user reads it.
export const worded = (name, value) => (WORDS[name] ? WORDS[name](value) : `${name} ${value}`);

const HERE = "On this page the fields are below Choose images: fill them in, then choose the file again";

// An error of the service names fields of its API; this page has some of them.
export const explained = (text) => (/`(channels|z|time|scene|diameter_px|pixel_size_um|allow_mask)`/.test(text) ? `${text}. ${HERE}` : text);

export function say(text) {
  $("status").textContent = text;
}

export async function guarded(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined; // of an image that the user has left
    if (error.status === 401) {
      $("token-form").hidden = false;
      say(`This service needs ${api.hasToken() ? "another token than the one given" : "a token"}: write it into the field at the top`);
    } else say(explained(error.message));
    if (!(error instanceof api.Problem)) console.error(error);
  }
  return undefined;
}

// Requests that change labels follow each other.
let last = Promise.resolve();
export function inTurn(work) {
  last = last.catch(() => {}).then(work);
  return last;
}
