/** Files that the reader drops on the page or chooses. */

import { byId } from "./dom.js";

/** Pass each file to a function. */
export function acceptDrops(take) {
  const overlay = byId("drop");
  const input = byId("file");
  window.addEventListener("dragover", (event) => {
    event.preventDefault();
    overlay.hidden = !event.dataTransfer.types.includes("Files");
  });
  window.addEventListener("dragleave", ({ relatedTarget }) => {
    overlay.hidden ||= !relatedTarget; // the pointer left the window
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    overlay.hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) {
      take(file);
    }
  });
  byId("choose").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // the same file may be chosen again
    if (file) {
      take(file);
    }
  });
}
