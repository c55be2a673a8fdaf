/** What the reader is told about a live stream: its lag, a lost connection, and a network that is too slow. */

import { State } from "./live-stream.js";
import { seconds } from "./times.js";

/** What is reported, in seconds: audio that waits to be sent, and lag beyond the lowest of the stream; windows take up to 4 s. */
const UNSENT_SECS = 2;
const LATE_SECS = 5;

/** Lag that is usual before anything is decoded, in seconds: the longest first window. */
const FIRST_LAG_SECS = 6;

const NOTHING_LOST = "Nothing is lost.";

export class StreamHealth {
  #state = State.CONNECTING;
  #error = null;
  #connected = false;
  #lowestSecs = FIRST_LAG_SECS;

  /** Take a new state of the stream, and the error that led to it. */
  enter(state, error) {
    if (state === State.OPEN) {
      this.#connected = true;
    }
    if (state !== State.CONNECTING) { // which follows LOST without news
      this.#error = error;
    }
    this.#state = state;
  }

  /** More audio is decoded: take the lag. */
  measure(lagSecs) {
    this.#lowestSecs = Math.min(this.#lowestSecs, lagSecs);
  }

  /** Return a sentence about what is wrong; empty if nothing is. */
  describe(stream, muted) {
    if (this.#state !== State.OPEN) {
      return this.#describeLoss(stream);
    }
    if (stream.unsentSecs > UNSENT_SECS) {
      return `The network is too slow: ${seconds(stream.unsentSecs)} of audio waits to be sent. ${NOTHING_LOST}`;
    }
    const lateSecs = stream.lagSecs - this.#lowestSecs;
    if (lateSecs > LATE_SECS) {
      return `The text is ${seconds(lateSecs)} late: the network or the server is too slow. ${NOTHING_LOST}`;
    }
    return muted ? "The system has muted the microphone." : "";
  }

  #describeLoss(stream) {
    const reason = this.#error ? ` ${this.#error.message}` : "";
    if (!this.#connected) {
      return reason ? `Waiting for the server.${reason}` : "";
    }
    return `The connection is lost; reconnecting.${reason} ${seconds(stream.unsentSecs)} of audio is kept and sent then.`;
  }
}
