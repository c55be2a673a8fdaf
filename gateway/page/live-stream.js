/** A live stream over `amira.v3`: it continues after a lost connection, and loses no audio. */

import { KeptAudio } from "./kept-audio.js";
import { openStream, ServerError } from "./server.js";
import { countSettled } from "./transcript.js";

export const RATE = 16000;

export const State = Object.freeze({
  CONNECTING: "connecting",
  OPEN: "open",
  LOST: "lost",
  DONE: "done",
  FAILED: "failed",
});

const END = new Uint8Array([0]);
const KEEPALIVE = new Uint8Array([1]);

/** Time without audio after which a keepalive is sent, in milliseconds. */
const KEEPALIVE_MS = 10_000;

/** Audio that the browser may queue, in bytes; the rest waits here, where its length is known. */
const MAX_QUEUED_BYTES = 64_000;

/** First and longest pause between attempts to connect, in milliseconds; it doubles. */
const PAUSE_RANGE_MS = [250, 4000];

/** Longest time without a connection, in milliseconds; then the stream fails. */
const RECONNECT_MS = 300_000;

/** Time for a connection to open, and for a message to follow audio, in milliseconds; then the connection counts as lost. */
const OPEN_MS = 10_000;
const SILENCE_MS = 60_000;

const TICK_MS = 200;

export class LiveStream {
  #options;
  #kept = new KeptAudio();
  #socket = null;
  #session = null;
  #origin = { samples: 0, segments: 0 }; // start of the stream at the server; later than 0 after a restart
  #acknowledged = 0; // the server needs no audio before this sample
  #settled = 0; // segments that a resumed stream does not repeat
  #rewind = null; // segments to keep when the first text of a new connection comes
  #sent = 0;
  #sentAt = 0;
  #heardAt = 0; // time of the last message
  #ending = false;
  #endSent = false;
  #lostAt = null;
  #pauseMs = PAUSE_RANGE_MS[0];
  #timers = { retry: 0, tick: 0, open: 0 };

  state = State.CONNECTING;

  /** Audio that was decoded for good at the last message, in samples. */
  decoded = 0;

  /** Audio that was appended so far, in samples. */
  get captured() {
    return this.#kept.end;
  }

  /**
   * @param {{ model: string, latency: string, transcript: Transcript, onState: Function, onText: Function,
   *   onProgress: Function, onTick: Function }} options `transcript` takes the segments; `onState` takes the state, and a
   *   ServerError or null; `onProgress` is called when more audio is decoded, `onTick` at intervals
   */
  constructor(options) {
    this.#options = options;
    this.#timers.tick = setInterval(() => this.#tick(), TICK_MS);
    window.addEventListener("online", this.#online);
    this.#connect();
  }

  /** Audio that is not on its way to the server, in seconds. */
  get unsentSecs() {
    return (this.#kept.end - this.#sent) / RATE + (this.#socket?.bufferedAmount ?? 0) / (2 * RATE);
  }

  /** Audio that is not decoded for good, in seconds. */
  get lagSecs() {
    return (this.#kept.end - this.decoded) / RATE;
  }

  get over() {
    return this.state === State.DONE || this.state === State.FAILED;
  }

  /** Send samples, an Int16Array, now or as soon as there is a connection. */
  append(samples) {
    if (!this.#ending && !this.over && samples.length) {
      this.#kept.append(samples);
      this.#send();
    }
  }

  /** End the audio; the last text follows. */
  end() {
    this.#ending = true;
    this.#send();
  }

  /** Give up: the rest of the text is not wanted. */
  abandon() {
    this.#finish(State.FAILED, null);
  }

  async #connect() {
    this.#enter(State.CONNECTING);
    let socket;
    try {
      socket = await openStream(this.#options.model, this.#options.latency);
    } catch (error) {
      this.#lose(error);
      return;
    }
    if (this.over) {
      socket.close();
      return;
    }
    let failure = null;
    this.#socket = socket;
    this.#timers.open = setTimeout(() => this.#drop(socket), OPEN_MS);
    const mine = (handle) => (event) => this.#socket === socket && handle(event);
    socket.onopen = mine(() => this.#open());
    socket.onmessage = mine(({ data }) => { failure = this.#take(JSON.parse(data)); });
    socket.onclose = mine(() => this.#lose(failure));
  }

  #open() {
    clearTimeout(this.#timers.open);
    this.#heardAt = performance.now();
    if (this.#session) {
      this.#socket.send(JSON.stringify({ type: "resume", session: this.#session }));
    }
    this.#sent = this.#session ? this.#acknowledged : this.#origin.samples;
    this.#rewind = this.#session ? this.#settled : this.#origin.segments;
    this.#endSent = false;
    this.#enter(State.OPEN);
    this.#send();
  }

  #send() {
    const socket = this.#socket;
    if (socket?.readyState !== WebSocket.OPEN) {
      return;
    }
    while (this.#sent < this.#kept.end && socket.bufferedAmount < MAX_QUEUED_BYTES) {
      const samples = this.#kept.from(this.#sent);
      socket.send(samples);
      this.#sent += samples.length;
      this.#sentAt = performance.now();
    }
    if (this.#ending && this.#sent === this.#kept.end && !this.#endSent) {
      socket.send(END);
      this.#endSent = true;
    }
  }

  /** Take a message of the server; return the error that it reports, or null. */
  #take(message) {
    this.#heardAt = performance.now();
    if (message.type === "error") {
      return new ServerError(message.error);
    }
    this.#lostAt = null;
    this.#pauseMs = PAUSE_RANGE_MS[0];
    if (message.type === "ack") {
      this.#session = message.session;
      this.#acknowledged = this.#origin.samples + message.samples;
      this.#settled = this.#origin.segments + message.settled.segments;
      // If the server forgets the stream, it begins again after the last final segment.
      this.#kept.dropBefore(Math.min(this.#acknowledged, this.#restartAt));
      this.#advance(message);
      return null;
    }
    this.#put(message, message.type === "final");
    return null;
  }

  #put(message, last) {
    const { transcript } = this.#options;
    if (this.#rewind !== null) {
      transcript.keep(this.#rewind);
      this.#rewind = null;
    }
    const { samples, segments } = this.#origin;
    const shift = samples / RATE;
    const words = message.words.map((word) => ({ ...word, start: word.start + shift, end: word.end + shift }));
    const final = last || message.segment_final;
    const index = segments + message.segment;
    const settledWords = final ? words.length : countSettled(message.text, words, message.stable_chars);
    // The first segment of a stream begins without a space, also after a restart.
    const text = index > message.segment && message.segment === 0 && words.length ? ` ${message.text}` : message.text;
    transcript.put(index, { text, words, settledWords, final, confidence: message.confidence });
    this.#advance(message);
    this.#options.onText(transcript);
    if (last) {
      this.#finish(State.DONE, null);
    }
  }

  #advance({ audio_processed_ms: decodedMs }) {
    this.decoded = this.#origin.samples + (decodedMs * RATE) / 1000;
    this.#options.onProgress();
  }

  get #restartAt() {
    return Math.floor(this.#options.transcript.finalSecs * RATE);
  }

  /** The connection ended: continue on another one, unless the error forbids it. */
  #lose(error) {
    this.#socket = null;
    clearTimeout(this.#timers.open);
    if (this.over) {
      return;
    }
    const now = performance.now();
    this.#lostAt ??= now;
    if (error?.code === "invalid_session" && this.#session) {
      this.#restart();
    } else if (error && !error.retryable) {
      this.#finish(State.FAILED, error);
      return;
    } else if (now - this.#lostAt > RECONNECT_MS) {
      this.#finish(State.FAILED, error ?? ServerError.unreachable());
      return;
    }
    this.#enter(State.LOST, error);
    this.#timers.retry = setTimeout(() => this.#connect(), Math.max(this.#pauseMs, error?.retryAfterMs ?? 0));
    this.#pauseMs = Math.min(2 * this.#pauseMs, PAUSE_RANGE_MS[1]);
  }

  /** Begin a new stream at the server after the last final segment: the server was restarted, and its tokens are void. */
  #restart() {
    const { transcript } = this.#options;
    const open = transcript.segments.findIndex(({ final }) => !final);
    this.#session = null;
    this.#origin = { samples: this.#restartAt, segments: open < 0 ? transcript.segments.length : open };
    this.#acknowledged = this.#origin.samples;
    this.#settled = this.#origin.segments;
  }

  /** Leave a connection on which nothing comes. */
  #drop(socket) {
    if (this.#socket === socket) {
      this.#socket = null;
      socket.close();
      this.#lose(null);
    }
  }

  /** The browser is on a network again. */
  #online = () => {
    if (this.state === State.LOST) {
      clearTimeout(this.#timers.retry);
      this.#connect();
    }
  };

  #tick() {
    const now = performance.now();
    this.#send();
    if (this.state === State.OPEN) {
      if (now - this.#heardAt > SILENCE_MS && this.#sentAt > this.#heardAt) {
        this.#drop(this.#socket);
      } else if (now - this.#sentAt > KEEPALIVE_MS && !this.#endSent) {
        this.#socket.send(KEEPALIVE);
        this.#sentAt = now;
      }
    }
    this.#options.onTick();
  }

  #enter(state, error = null) {
    this.state = state;
    this.#options.onState(state, error);
  }

  #finish(state, error) {
    if (this.over) {
      return;
    }
    clearInterval(this.#timers.tick);
    clearTimeout(this.#timers.retry);
    clearTimeout(this.#timers.open);
    window.removeEventListener("online", this.#online);
    const socket = this.#socket;
    this.#socket = null;
    this.#enter(state, error);
    socket?.close();
  }
}
