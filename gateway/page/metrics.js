/** Read Prometheus's text format (https://prometheus.io/docs/instrumenting/exposition_formats/). */

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Return the samples of a page of metrics, as { name, labels, value }. */
export function parseMetrics(text) {
  return text
    .split("\n")
    .map((line) => SAMPLE.exec(line))
    .filter(Boolean)
    .map(([, name, labels = "", value]) => ({
      name,
      labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, text]) => [key, text])),
      value: value === "+Inf" ? Infinity : Number(value),
    }));
}

/** Return the sum of a metric's samples, of those alone that a function accepts by their labels. */
export function total(samples, name, accepts = () => true) {
  return samples
    .filter((sample) => sample.name === name && accepts(sample.labels))
    .reduce((sum, { value }) => sum + value, 0);
}

/**
 * Return a quantile of what a histogram observed between two readings, as Prometheus's histogram_quantile; null without
 * observations.
 */
export function quantile(earlier, later, name, share) {
  const bounds = new Map(); // of the upper bound to the count of observations up to it
  for (const [sign, samples] of [[-1, earlier], [1, later]]) {
    for (const { name: found, labels, value } of samples) {
      if (found === `${name}_bucket`) {
        const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
        bounds.set(bound, (bounds.get(bound) ?? 0) + sign * value);
      }
    }
  }
  const buckets = [...bounds].sort(([a], [b]) => a - b);
  const count = buckets.at(-1)?.[1] ?? 0;
  if (count <= 0) {
    return null;
  }
  let [lower, below] = [0, 0];
  for (const [bound, within] of buckets) {
    if (within >= share * count) {
      return bound === Infinity ? lower : lower + ((bound - lower) * (share * count - below)) / (within - below);
    }
    [lower, below] = [bound, within];
  }
  return lower;
}
