/** The transcript of a stream or recording: its segments, and which of their words can still change. */

/** Return the number of words that can no longer change: a character that is settled follows them. */
export function countSettled(text, words, settledChars) {
  const settledUnits = [...text].slice(0, settledChars).join("").length; // the server counts code points
  let end = 0;
  let count = 0;
  for (const { word } of words) {
    end = text.indexOf(word, end) + word.length;
    if (end >= settledUnits) {
      break;
    }
    count += 1;
  }
  return count;
}

export class Transcript {
  /** Of { text, words, settledWords, final }; the texts, concatenated, are the transcript. */
  segments = [];

  /** Replace or append a segment. */
  put(index, segment) {
    this.segments[index] = segment;
  }

  /** Remove all segments but the first ones. */
  keep(count) {
    this.segments.length = Math.min(count, this.segments.length);
  }

  get text() {
    return this.segments.map(({ text }) => text).join("").trim();
  }

  get words() {
    return this.segments.flatMap(({ words }) => words);
  }

  /** End of the last word of the leading segments that are final, in seconds. */
  get finalSecs() {
    const open = this.segments.findIndex(({ final }) => !final);
    const closed = open < 0 ? this.segments : this.segments.slice(0, open);
    return closed.findLast(({ words }) => words.length)?.words.at(-1).end ?? 0;
  }

  /** The segments that have words, as the server's JSON for recordings has them. */
  toJson() {
    return this.segments
      .filter(({ words }) => words.length)
      .map(({ text, words, confidence = null }, id) => (
        { id, start: words[0].start, end: words.at(-1).end, text: text.trim(), words, confidence }
      ));
  }
}
