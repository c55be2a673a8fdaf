/** The controls of the page, and what they show. */

import { byId, element } from "./dom.js";
import { listMicrophones, onDevicesChange } from "./microphone.js";
import { readModels } from "./server.js";
import { clock, seconds } from "./times.js";

export const Mode = Object.freeze({
  IDLE: "idle",
  STARTING: "starting",
  LISTENING: "listening",
  FINISHING: "finishing",
  READING: "reading",
});

const LABELS = {
  [Mode.IDLE]: "Start",
  [Mode.STARTING]: "Starting",
  [Mode.LISTENING]: "Stop",
  [Mode.FINISHING]: "Finishing",
  [Mode.READING]: "Start",
};

/** Quietest level that the meter shows, in decibels below full scale. */
const FLOOR_DB = -60;

/** Time between two attempts to read the models, in milliseconds. */
const RETRY_MS = 2000;

export class Controls {
  constructor() {
    byId("show-key").addEventListener("click", () => this.askForKey());
    byId("options").addEventListener("submit", (event) => event.preventDefault());
    onDevicesChange(() => this.listDevices());
  }

  get device() {
    return byId("device").value;
  }

  get model() {
    return byId("model").value;
  }

  get latency() {
    return byId("latency").value;
  }

  /** Fill the choices; wait until the server answers. */
  async load() {
    this.listDevices();
    try {
      const models = Object.entries(await readModels());
      byId("model").replaceChildren(
        ...models.map(([name, ready]) => element("option", { value: name }, ready ? name : `${name} (not ready)`))
      );
      this.notify("");
      this.#allowRecording(true);
    } catch (error) {
      this.notify(error.message, true);
      setTimeout(() => this.load(), RETRY_MS);
    }
  }

  /** Fill the choice of microphones; the chosen one stays if it is still there. */
  async listDevices() {
    const chosen = this.device;
    const found = (await listMicrophones()).filter(({ id }) => id);
    byId("device").replaceChildren(
      element("option", { value: "" }, "Default"),
      ...found.map(({ id, label }, i) => element("option", { value: id }, label || `Microphone ${i + 1}`))
    );
    byId("device").value = found.some(({ id }) => id === chosen) ? chosen : "";
  }

  enter(mode) {
    document.body.dataset.mode = mode;
    byId("record-label").textContent = LABELS[mode];
    this.#allowRecording([Mode.IDLE, Mode.LISTENING].includes(mode));
    byId("progress-row").hidden = ![Mode.READING, Mode.FINISHING].includes(mode);
    for (const id of ["device", "model", "latency"]) {
      byId(id).disabled = mode !== Mode.IDLE;
    }
    if (mode !== Mode.LISTENING) {
      this.showLevel(0);
    }
  }

  /** Whether the button can be pressed. It is never disabled, since it would lose the keyboard's focus. */
  get canRecord() {
    return byId("record").ariaDisabled === "false";
  }

  #allowRecording(allowed) {
    byId("record").ariaDisabled = String(!allowed);
  }

  reset() {
    this.allowExport(false);
    this.notify("");
    this.showElapsed(0);
    this.showProgress("Uploading", 0);
    this.showFacts();
    byId("lag").textContent = "–";
  }

  /** Show a sentence; an empty one hides the notice. */
  notify(text, isError = false) {
    const notice = byId("notice");
    notice.hidden = !text;
    notice.classList.toggle("error", isError);
    if (notice.textContent !== text) { // a screen reader reads each change
      notice.textContent = text;
    }
  }

  /** Show a peak from 0 to 1 on a logarithmic scale. */
  showLevel(peak) {
    const share = Math.max(0, 1 - (20 * Math.log10(Math.max(peak, 1e-6))) / FLOOR_DB);
    byId("level").setAttribute("aria-valuenow", String(Math.round(100 * share)));
    byId("level-bar").style.transform = `scaleX(${share.toFixed(3)})`;
  }

  showElapsed(secs) {
    byId("elapsed").textContent = clock(secs);
  }

  showLag(secs) {
    byId("lag").textContent = seconds(secs);
  }

  /** Show a share from 0 to 1; null where it is not known. */
  showProgress(text, share) {
    byId("progress-label").textContent = text;
    if (share === null) {
      byId("progress").removeAttribute("value");
    } else {
      byId("progress").value = share;
    }
  }

  /** Show short facts about the transcript. */
  showFacts(...facts) {
    byId("facts").textContent = facts.filter(Boolean).join(" · ");
  }

  allowExport(allowed) {
    for (const button of document.querySelectorAll(".tools button")) {
      button.disabled = !allowed;
    }
  }

  askForKey() {
    byId("key-field").hidden = false;
    byId("key-note").hidden = false;
    byId("show-key").hidden = true;
    byId("show-key").setAttribute("aria-expanded", "true");
    byId("key").focus();
  }
}
