/** Times and sizes as text. */

/** Return seconds as `m:ss`, or `h:mm:ss` from one hour on. */
export function clock(secs) {
  const whole = Math.floor(secs);
  const [hours, minutes, seconds] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const tail = `${String(minutes).padStart(hours ? 2 : 1, "0")}:${String(seconds).padStart(2, "0")}`;
  return hours ? `${hours}:${tail}` : tail;
}

/** Return seconds with one decimal place and the unit. */
export const seconds = (secs) => `${secs.toFixed(1)} s`;

/** Return a share of 1 as a percentage. */
export const percent = (share) => `${Math.round(100 * share)} %`;
