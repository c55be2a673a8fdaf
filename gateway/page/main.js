/** The page: the microphone or a file in, a transcript out. */

import { Controls, Mode } from "./controls.js";
import { byId } from "./dom.js";
import { copyText, download } from "./downloads.js";
import { acceptDrops } from "./drops.js";
import { LiveStream, RATE, State } from "./live-stream.js";
import { Microphone } from "./microphone.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";
import { setKey } from "./server.js";
import { StreamHealth } from "./stream-health.js";
import { clock, percent, seconds } from "./times.js";
import { Transcript } from "./transcript.js";
import { TranscriptView } from "./transcript-view.js";
import { toWav } from "./wav.js";

const controls = new Controls();
const player = new Player((secs) => view.mark(secs));
const view = new TranscriptView((secs) => player.playFrom(secs));

let transcript = new Transcript();
let name = "transcript"; // of downloads
let ongoing = null; // a Live or a Recording

/** A live transcription, from the microphone to the last text. */
class Live {
  #microphone = null;
  #stream = null;
  #health = new StreamHealth();
  #pieces = [];
  #muted = false;
  #stopping = false;

  async start() {
    controls.enter(Mode.STARTING);
    const handlers = {
      onSamples: (samples, peak) => this.#take(samples, peak),
      onMuted: (muted) => { this.#muted = muted; },
      onLost: () => this.stop(),
    };
    try {
      this.#microphone = await Microphone.open(controls.device, handlers);
    } catch (error) {
      finish(error);
      return;
    }
    const { model, latency } = controls;
    controls.showFacts(model, latency ? `latency ${latency}` : "");
    name = `transcript-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}`;
    this.#stream = new LiveStream({
      model,
      latency,
      transcript,
      onState: (state, error) => this.#follow(state, error),
      onText: () => view.update(transcript),
      onProgress: () => this.#showLag(),
      onTick: () => this.#watch(),
    });
    controls.enter(Mode.LISTENING);
    await controls.listDevices(); // their names are known now
  }

  /** End the audio; the last text follows. */
  async stop() {
    if (this.#stopping) {
      return;
    }
    this.#stopping = true;
    controls.enter(Mode.FINISHING);
    controls.showProgress("Waiting for the last words", null);
    await this.#microphone.stop();
    this.#stream.end();
    player.load(toWav(this.#pieces, RATE));
  }

  /** Give up the last text. */
  cancel() {
    this.#stream.abandon();
  }

  #take(samples, peak) {
    controls.showLevel(peak);
    if (this.#stream) {
      this.#pieces.push(samples);
      this.#stream.append(samples);
    }
  }

  #showLag() {
    if (!this.#stopping) { // the last text has none
      this.#health.measure(this.#stream.lagSecs);
      controls.showLag(this.#stream.lagSecs);
    }
  }

  #watch() {
    controls.showElapsed(this.#stream.captured / RATE);
    controls.notify(this.#health.describe(this.#stream, this.#muted));
  }

  async #follow(state, error) {
    this.#health.enter(state, error);
    if (state === State.DONE || state === State.FAILED) {
      if (!this.#stopping) {
        await this.#microphone.stop();
        player.load(toWav(this.#pieces, RATE));
      }
      finish(error);
    }
  }
}

/** Transcribe a file. */
async function transcribe(file) {
  if (ongoing) {
    controls.notify("Stop the present transcription first.");
    return;
  }
  begin();
  name = file.name.replace(/\.[^.]*$/, "") || "transcript";
  const { model } = controls;
  controls.showFacts(model, file.name);
  controls.enter(Mode.READING);
  player.load(file);
  ongoing = new Recording({
    onUpload: (share) => controls.showProgress(
      share < 1 ? `Uploading ${percent(share)}` : "Decoding the recording", share < 1 ? share : null
    ),
    onSegment: (segment) => {
      const { text, words, confidence, id } = segment;
      transcript.put(id, { text: id ? ` ${text}` : text, words, settledWords: words.length, final: true, confidence });
      view.update(transcript);
      controls.showElapsed(segment.end);
      const share = segment.end / player.duration; // NaN or Infinity where the length is not known
      controls.showProgress(`Transcribed ${clock(segment.end)}`, share <= 1 ? share : null);
    },
  });
  const began = performance.now();
  try {
    const { audio_length_samples: samples } = await ongoing.transcribe(file, model);
    const took = (performance.now() - began) / 1000;
    controls.showElapsed(samples / RATE);
    controls.showFacts(model, file.name, `${clock(samples / RATE)} of audio in ${seconds(took)}`);
    finish(null);
  } catch (error) {
    finish(error);
  }
}

function begin() {
  transcript = new Transcript();
  view.clear();
  player.load(null);
  controls.reset();
}

function finish(error) {
  ongoing = null;
  controls.enter(Mode.IDLE);
  controls.allowExport(transcript.words.length > 0);
  controls.notify(error?.message ?? (transcript.words.length ? "" : "No speech was recognised."), Boolean(error));
  if (error?.code === "invalid_api_key") {
    controls.askForKey();
  }
}

function startOrStop() {
  if (!controls.canRecord) {
    return;
  }
  if (ongoing) {
    ongoing.stop();
    return;
  }
  begin();
  ongoing = new Live();
  ongoing.start();
}

async function exporting(action, done) {
  try {
    await action();
    controls.notify(done);
  } catch (error) {
    controls.notify(error.message, true);
  }
}

byId("record").addEventListener("click", startOrStop);
byId("cancel").addEventListener("click", () => ongoing?.cancel());
byId("copy").addEventListener("click", () => exporting(() => copyText(transcript), "The text was copied."));
for (const button of document.querySelectorAll("[data-format]")) {
  const { format } = button.dataset;
  button.addEventListener("click", () => exporting(() => download(transcript, format, name), `${name}.${format} was saved.`));
}
byId("key").addEventListener("input", ({ target }) => setKey(target.value));
window.addEventListener("beforeunload", (event) => {
  if (ongoing) {
    event.preventDefault();
  }
});
acceptDrops(transcribe);
controls.load();
