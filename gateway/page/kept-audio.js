/** Audio of a stream that may have to be sent again. */

export class KeptAudio {
  #pieces = []; // of { start, samples }, contiguous

  /** Position after the last sample. */
  end = 0;

  /** Append samples, an Int16Array. */
  append(samples) {
    this.#pieces.push({ start: this.end, samples });
    this.end += samples.length;
  }

  /** Forget audio before a position. */
  dropBefore(position) {
    const first = this.#pieces.findIndex(({ start, samples }) => start + samples.length > position);
    this.#pieces.splice(0, first < 0 ? this.#pieces.length : first);
  }

  /** Return samples from a position on, up to the end of its piece. */
  from(position) {
    const { start, samples } = this.#pieces.findLast((piece) => piece.start <= position);
    return samples.subarray(position - start);
  }
}
