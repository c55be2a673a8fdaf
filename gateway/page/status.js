/** The state of the server, read every two seconds. */

import { byId, element } from "./dom.js";
import { parseMetrics, quantile, total } from "./metrics.js";
import { request, serverUrl, setKey } from "./server.js";
import { drawSpark } from "./spark.js";
import { clock, seconds } from "./times.js";

const POLL_MS = 2000;

/** Time over which rates and quantiles are taken, and length of the curves, in milliseconds. */
const RECENT_MS = 60_000;
const HISTORY_MS = 300_000;

const KINDS = { batch: "recordings", stream: "live streams", realtime: "OpenAI realtime" };

/** States of the service in words; and whether each is good. */
const STATES = {
  ready: ["Ready", true],
  degraded: ["Degraded: a Triton or a model is not ready", false],
  initializing: ["Starting: no model is ready yet", false],
  draining: ["Draining: new work is refused", false],
  critical: ["Down: no model is ready", false],
};

const readings = []; // of { at, samples, streams, batches, lag, audio }
const lastSeen = new Map(); // of an error's code to the time at which its count last rose

const isFailure = ({ status }) => Number(status) >= 400;

/** Return the oldest reading within the recent time, or the oldest of all. */
function before(now) {
  return readings.find(({ at }) => now - at <= RECENT_MS) ?? readings[0];
}

function measure(samples, health, now) {
  const earlier = before(now);
  const elapsedSecs = earlier ? (now - earlier.at) / 1000 : 0;
  const audio = earlier ? total(samples, "asr_audio_seconds_total") - total(earlier.samples, "asr_audio_seconds_total") : 0;
  return {
    at: now,
    samples,
    streams: total(samples, "asr_active_connections"),
    batches: total(samples, "asr_active_batches"),
    lag: quantile(earlier?.samples ?? [], samples, "asr_stream_lag_seconds", 0.95),
    audio: elapsedSecs ? audio / elapsedSecs : 0,
    health,
  };
}

const cell = (text, className = "") => element("td", { className }, text);
const number = (value) => cell(String(value), "number");
const state = (text, good) => element("td", {}, element("span", { className: `state ${good ? "good" : "bad"}` }, text));

function fill(id, rows, empty) {
  const filled = rows.length ? rows : [element("tr", {}, element("td", { colSpan: 9 }, empty))];
  byId(id).replaceChildren(...filled);
}

function showTiles(reading, { streams, batches }) {
  byId("streams").textContent = reading.streams;
  byId("streams-of").textContent = `of ${streams.capacity}`;
  byId("batches").textContent = reading.batches;
  byId("batches-of").textContent = `of ${batches.capacity}, ${batches.queue} may wait`;
  byId("lag").textContent = reading.lag === null ? "–" : seconds(reading.lag);
  byId("audio").textContent = reading.audio.toFixed(1);
  for (const name of ["streams", "batches", "lag", "audio"]) {
    drawSpark(byId(`${name}-spark`), readings.map((one) => one[name] ?? 0));
  }
}

function showTritons(tritons) {
  const rows = tritons.map(({ endpoint, reachable, latency_ms: ping, breaker, sequences, models, recognition }) => {
    const unready = Object.entries(models).filter(([, one]) => one !== "ready").map(([name, one]) => `${name} ${one}`);
    const names = Object.keys(models).length;
    const deaf = Object.entries(recognition).filter(([, { ok }]) => !ok).map(([name]) => name);
    return element(
      "tr", {},
      cell(endpoint),
      state(reachable ? "reachable" : "unreachable", reachable),
      number(ping === null ? "–" : `${ping.toFixed(1)} ms`),
      number(sequences),
      cell(breaker),
      state(unready.join(", ") || `${names} ready`, names > 0 && !unready.length),
      state(deaf.length ? `not ${deaf.join(", ")}` : "yes", !deaf.length)
    );
  });
  fill("tritons", rows, "no Triton");
}

function showRequests({ samples, at }) {
  const earlier = before(at).samples;
  const models = [...new Set(samples.filter(({ name }) => name === "asr_requests_total").map(({ labels }) => labels.model))];
  const rows = Object.entries(KINDS).flatMap(([kind, words]) => models.map((model) => {
    const mine = (labels) => labels.endpoint === kind && labels.model === model;
    const count = total(samples, "asr_requests_total", mine);
    const isMine = ({ labels }) => mine(labels);
    const median = quantile([], samples.filter(isMine), "asr_request_duration_seconds", 0.5);
    return { words, model, count, median, recent: count - total(earlier, "asr_requests_total", mine),
      failed: total(samples, "asr_requests_total", (labels) => mine(labels) && isFailure(labels)) };
  }));
  fill(
    "requests",
    rows.filter(({ count }) => count).map(({ words, model, count, median, recent, failed }) => element(
      "tr", {}, cell(words), cell(model), number(count), number(recent), number(failed), number(median === null ? "–" : seconds(median))
    )),
    "none yet"
  );
}

function showErrors({ samples, at }) {
  const earlier = before(at).samples;
  const previous = readings.at(-2)?.samples;
  const counted = samples.filter(({ name, value }) => name === "asr_rejections_total" && value);
  const rows = counted.map(({ labels: { reason }, value }) => {
    const same = (labels) => labels.reason === reason;
    if (previous && value > total(previous, "asr_rejections_total", same)) {
      lastSeen.set(reason, at);
    }
    const seen = lastSeen.get(reason);
    return { reason, value, seen, recent: value - total(earlier, "asr_rejections_total", same) };
  });
  rows.sort((a, b) => (b.seen ?? 0) - (a.seen ?? 0) || b.value - a.value);
  fill(
    "errors",
    rows.map(({ reason, value, seen, recent }) => element(
      "tr", {}, element("td", {}, element("code", {}, reason)), number(value), number(recent),
      cell(seen ? `${Math.round((at - seen) / 1000)} s ago` : "before this page was opened")
    )),
    "none since the start"
  );
}

function showState({ status, version, uptime_secs: uptime, service }) {
  const [words] = STATES[status] ?? [status];
  byId("state").textContent = words;
  byId("facts").textContent = `${service} ${version} · up ${clock(uptime)}`;
}

async function read() {
  const response = await fetch(serverUrl("health/detailed")); // 503 has a body too
  const samples = parseMetrics(await (await request("metrics")).text());
  return [await response.json(), samples];
}

async function poll() {
  try {
    const [health, samples] = await read();
    const now = performance.now();
    const reading = measure(samples, health, now);
    readings.push(reading);
    readings.splice(0, readings.findIndex(({ at }) => now - at <= HISTORY_MS));
    byId("key-form").hidden = true;
    showState(health);
    showTiles(reading, health);
    showTritons(health.dependencies.triton);
    showRequests(reading);
    showErrors(reading);
  } catch (error) {
    byId("state").textContent = error.code ? error.message : "The server cannot be reached";
    byId("key-form").hidden = !["invalid_api_key", "unknown"].includes(error.code);
  }
  setTimeout(poll, POLL_MS);
}

byId("key").addEventListener("input", ({ target }) => setKey(target.value));
byId("key-form").addEventListener("submit", (event) => event.preventDefault());
poll();
