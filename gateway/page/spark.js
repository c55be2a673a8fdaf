/** Small curves. */

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 32;

/** Fewest places of a curve. */
const MIN_POINTS = 16;

/** Draw values as a curve, the last one at the right edge. */
export function drawSpark(svg, values) {
  const top = Math.max(1, ...values);
  const points = Math.max(MIN_POINTS, values.length);
  const line = svg.querySelector("polyline") ?? svg.appendChild(document.createElementNS(SVG, "polyline"));
  const place = (value, i) => `${points - values.length + i},${(HEIGHT - 1 - ((HEIGHT - 2) * value) / top).toFixed(1)}`;
  svg.setAttribute("viewBox", `0 0 ${points - 1} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  line.setAttribute("points", values.map(place).join(" "));
}
