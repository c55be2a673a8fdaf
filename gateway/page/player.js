/** The audio of the transcript: its position follows the words, and the words follow it. */

import { byId } from "./dom.js";

const UNPLAYABLE = "This browser cannot play the file. The transcript is not affected.";

export class Player {
  #audio = byId("audio");
  #url = null;
  #onPosition;

  /** `onPosition` takes the position in seconds while it changes. */
  constructor(onPosition) {
    this.#onPosition = onPosition;
    this.#audio.addEventListener("play", () => this.#follow());
    this.#audio.addEventListener("seeking", () => this.#onPosition(this.#audio.currentTime));
    this.#audio.addEventListener("error", () => this.#fail());
  }

  /** Length in seconds; NaN while it is not known. */
  get duration() {
    return this.#audio.duration;
  }

  /** Show the player with a Blob of audio; without one, hide it. */
  load(blob) {
    if (this.#url) {
      URL.revokeObjectURL(this.#url);
    }
    this.#url = blob ? URL.createObjectURL(blob) : null;
    byId("player").hidden = !blob;
    byId("player-note").textContent = "";
    this.#audio.hidden = false;
    if (blob) {
      this.#audio.src = this.#url;
    } else {
      this.#audio.removeAttribute("src");
      this.#audio.load();
    }
  }

  /** Play from a time in seconds. */
  playFrom(secs) {
    if (this.#url && !this.#audio.error) {
      this.#audio.currentTime = secs;
      this.#audio.play().catch(() => {}); // the error event has the reason
    }
  }

  #follow() {
    if (!this.#audio.paused) {
      this.#onPosition(this.#audio.currentTime);
      requestAnimationFrame(() => this.#follow());
    }
  }

  #fail() {
    if (this.#url) {
      this.#audio.hidden = true;
      byId("player-note").textContent = UNPLAYABLE;
    }
  }
}
