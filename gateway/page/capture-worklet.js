/** Turn the microphone's signal into frames of 16-bit samples at 16 kHz, on the audio thread. */

import { Resampler } from "./resampler.js";

const RATE = 16000;

/** Samples of a frame: 100 ms. */
const FRAME = 1600;

class Capture extends AudioWorkletProcessor {
  #resampler = sampleRate === RATE ? null : new Resampler(sampleRate, RATE);
  #frame = new Int16Array(FRAME);
  #filled = 0;
  #peak = 0;
  #stopped = false;

  constructor() {
    super();
    this.port.onmessage = () => this.#stop();
  }

  process([[samples]]) {
    if (samples && !this.#stopped) {
      this.#append(this.#resampler ? this.#resampler.convert(samples) : samples);
    }
    return !this.#stopped;
  }

  #append(samples) {
    for (const sample of samples) {
      const limited = Math.max(-1, Math.min(1, sample));
      this.#peak = Math.max(this.#peak, Math.abs(limited));
      this.#frame[this.#filled] = Math.round(limited * (limited < 0 ? 32768 : 32767));
      this.#filled += 1;
      if (this.#filled === FRAME) {
        this.#post();
      }
    }
  }

  #post() {
    const samples = this.#frame.slice(0, this.#filled);
    this.port.postMessage({ samples, peak: this.#peak }, [samples.buffer]);
    this.#filled = 0;
    this.#peak = 0;
  }

  #stop() {
    if (this.#resampler) {
      this.#append(this.#resampler.flush());
    }
    this.#post();
    this.#stopped = true;
    this.port.postMessage(null);
  }
}

registerProcessor("capture", Capture);
