/** Convert a stream of samples to a lower rate, by a windowed sinc filter in polyphase form (Crochiere and Rabiner, 1983). */

/** Zero crossings of the sinc on each side; more make the filter steeper. */
const CROSSINGS = 24;

/** Cutoff as a share of half the lower rate; the rest is for the filter's slope. */
const CUTOFF = 0.92;

const divisor = (a, b) => (b ? divisor(b, a % b) : a);

/** Return the filter for output samples that lie `offset` input samples after an input sample. */
function taps(offset, half, cutoff) {
  const filter = new Float32Array(2 * half);
  let sum = 0;
  for (let i = 0; i < filter.length; i += 1) {
    const x = i - half + 1 - offset;
    const sinc = x ? Math.sin(Math.PI * cutoff * x) / (Math.PI * x) : cutoff;
    filter[i] = sinc * (0.5 + 0.5 * Math.cos((Math.PI * x) / (half + 1))); // Hann
    sum += filter[i];
  }
  return filter.map((value) => value / sum);
}

export class Resampler {
  #step; // input samples per output sample: up / down
  #phases;
  #half;
  #filters;
  #input;
  #phase = 0;

  /** Both rates in Hz; `from` is the higher one. */
  constructor(from, to) {
    const common = divisor(from, to);
    this.#step = from / common;
    this.#phases = to / common;
    this.#half = Math.ceil((CROSSINGS * from) / to);
    const cutoff = (CUTOFF * to) / from;
    this.#filters = Array.from({ length: this.#phases }, (_, phase) => taps(phase / this.#phases, this.#half, cutoff));
    this.#input = new Float32Array(this.#half - 1); // silence before the first sample
  }

  /** Return the output for more input, both Float32Arrays; half a filter's length of input stays for the next call. */
  convert(more) {
    const input = new Float32Array(this.#input.length + more.length);
    input.set(this.#input);
    input.set(more, this.#input.length);
    const output = [];
    let at = 0;
    for (; at + 2 * this.#half <= input.length; ) {
      const filter = this.#filters[this.#phase];
      let sum = 0;
      for (let i = 0; i < filter.length; i += 1) {
        sum += filter[i] * input[at + i];
      }
      output.push(sum);
      const next = this.#phase + this.#step;
      at += Math.floor(next / this.#phases);
      this.#phase = next % this.#phases;
    }
    this.#input = input.slice(at);
    return Float32Array.from(output);
  }

  /** Return the output for the last input. */
  flush() {
    return this.convert(new Float32Array(this.#half));
  }
}
