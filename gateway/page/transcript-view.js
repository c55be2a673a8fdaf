/** The transcript on the page: words with their times and confidence, and the word that is being played. */

import { byId, element } from "./dom.js";
import { clock, percent } from "./times.js";

/** Lowest confidence of each shade, from none to the strongest. */
const SHADES = [0.8, 0.6, 0.4, 0];

/** Distance of the last word below the window within which the page follows new text, in pixels. */
const NEAR_END_PX = 160;

/** Time after which the page scrolls to the played word again, in milliseconds, if the reader scrolled. */
const READING_MS = 4000;

const shadeOf = (confidence) => SHADES.findIndex((lowest) => confidence >= lowest);

/** Return the index of the last item that starts at or before a time; -1 if there is none. */
function lastBefore(items, secs, startOf) {
  let [low, high] = [0, items.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (startOf(items[middle]) <= secs) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

export class TranscriptView {
  #list = byId("segments");
  #tip = byId("tip");
  #log = byId("spoken");
  #rows = []; // of { item, time, line, spans, words, spoken }
  #marked = null;
  #scrolledAt = -Infinity;
  #onSeek;

  /** `onSeek` takes a time in seconds that the reader chose. */
  constructor(onSeek) {
    this.#onSeek = onSeek;
    this.#list.addEventListener("click", (event) => this.#choose(event));
    this.#list.addEventListener("keydown", (event) => this.#move(event));
    this.#list.addEventListener("pointerover", ({ target }) => this.#showTip(target.closest(".word")));
    this.#list.addEventListener("pointerleave", () => this.#showTip(null));
    for (const kind of ["wheel", "touchmove"]) {
      window.addEventListener(kind, () => { this.#scrolledAt = performance.now(); }, { passive: true });
    }
  }

  clear() {
    this.#rows = [];
    this.#marked = null;
    this.#list.replaceChildren();
    this.#log.replaceChildren();
    this.#showTip(null);
    byId("placeholder").hidden = false;
  }

  /** Show a transcript; only what changed is touched, so that a selection stays. */
  update({ segments }) {
    const end = this.#lastSpan()?.getBoundingClientRect().bottom ?? 0;
    this.#rows.splice(segments.length).forEach(({ item }) => item.remove());
    // Earlier segments may change after a lost connection, but are few then; final ones are skipped.
    segments.forEach((segment, index) => this.#updateRow(index, segment));
    byId("placeholder").hidden = segments.some(({ words }) => words.length);
    if (end < window.innerHeight + NEAR_END_PX) {
      this.#lastSpan()?.scrollIntoView({ block: "nearest" });
    }
  }

  #lastSpan() {
    return this.#rows.findLast(({ spans }) => spans.length)?.spans.at(-1);
  }

  #updateRow(index, segment) {
    const row = (this.#rows[index] ??= this.#addRow());
    if (row.segment === segment) {
      return;
    }
    row.segment = segment;
    const { words, settledWords, final } = segment;
    while (row.spans.length > words.length) {
      row.spans.pop().remove();
      row.line.lastChild?.remove(); // the space before it
    }
    words.forEach((word, i) => {
      if (i === row.spans.length) {
        const span = element("span", { className: "word" });
        row.line.append(...(i ? [" "] : []), span);
        row.spans.push(span);
      }
      const span = row.spans[i];
      if (span.textContent !== word.word) {
        span.textContent = word.word;
      }
      span.word = word;
      span.classList.toggle("unsettled", i >= settledWords);
      span.dataset.shade = i < settledWords ? shadeOf(word.confidence) : 0;
    });
    row.item.hidden = !words.length;
    if (words.length) {
      const { start } = words[0];
      row.time.textContent = clock(start);
      row.time.setAttribute("aria-label", `Play from ${clock(start)}`);
    }
    if (final && !row.spoken) {
      row.spoken = true;
      this.#log.append(element("p", {}, segment.text.trim()));
    }
  }

  #addRow() {
    const time = element("button", { type: "button", className: "time" });
    const line = element("p", {});
    const item = element("li", {}, time, line);
    this.#list.append(item);
    return { item, time, line, spans: [], segment: null, spoken: false };
  }

  /** Mark the word that is spoken at a time, and scroll to it unless the reader looks elsewhere. */
  mark(secs) {
    const span = this.#spanAt(secs);
    if (span === this.#marked) {
      return;
    }
    this.#markSpan(span);
    if (span && performance.now() - this.#scrolledAt > READING_MS) {
      this.#scrollTo(span);
    }
  }

  #spanAt(secs) {
    const rows = this.#rows.filter(({ spans }) => spans.length);
    const row = rows[lastBefore(rows, secs, ({ spans }) => spans[0].word.start)];
    return row ? row.spans[lastBefore(row.spans, secs, ({ word }) => word.start)] : null;
  }

  #markSpan(span) {
    this.#marked?.classList.remove("marked");
    span?.classList.add("marked");
    this.#marked = span;
  }

  #scrollTo(span) {
    const { top, bottom } = span.getBoundingClientRect();
    const visibleTop = byId("controls").getBoundingClientRect().bottom;
    if (top < visibleTop || bottom > window.innerHeight - byId("player").offsetHeight) {
      span.scrollIntoView({ block: "center" });
    }
  }

  #choose({ target }) {
    const span = target.closest(".word") ?? (target.closest(".time") && target.closest("li").querySelector(".word"));
    if (span && window.getSelection().isCollapsed) {
      this.#markSpan(span);
      this.#showTip(span);
      this.#onSeek(span.word.start);
    }
  }

  /** Arrow keys move from word to word, Enter plays from the word. */
  #move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.target !== this.#list || !(step || event.key === "Enter")) {
      return;
    }
    event.preventDefault();
    if (!step) {
      this.#onSeek(this.#marked?.word.start ?? 0);
      return;
    }
    const spans = this.#rows.flatMap((row) => row.spans);
    const at = spans.indexOf(this.#marked) + step;
    const span = spans[Math.max(0, Math.min(spans.length - 1, at))];
    if (span) {
      this.#markSpan(span);
      this.#showTip(span);
      this.#scrollTo(span);
    }
  }

  #showTip(span) {
    this.#tip.hidden = !span;
    if (span) {
      const { start, end, confidence } = span.word;
      this.#tip.textContent = `${start.toFixed(2)} – ${end.toFixed(2)} s · ${percent(confidence)}`;
      const { left, top, width } = span.getBoundingClientRect();
      const half = this.#tip.offsetWidth / 2;
      const centre = Math.max(half + 8, Math.min(window.innerWidth - half - 8, left + width / 2));
      this.#tip.style.left = `${centre - half}px`;
      this.#tip.style.top = `${top - this.#tip.offsetHeight - 6}px`;
    }
  }
}
