/** Copy and download a transcript. The server writes texts and subtitles, so that they are those of its API. */

import { request } from "./server.js";

/** Copy the text to the clipboard. */
export async function copyText(transcript) {
  await navigator.clipboard.writeText(transcript.text);
}

/**
 * Save a transcript as a file.
 *
 * @param {Transcript} transcript
 * @param {string} format `txt`, `srt`, `vtt` or `json`
 * @param {string} name of the file, without its ending
 */
export async function download(transcript, format, name) {
  const segments = transcript.toJson();
  let content = JSON.stringify({ text: transcript.text, words: transcript.words, segments }, null, 2);
  if (format !== "json") {
    const headers = { "Content-Type": "application/json" };
    const body = JSON.stringify({ segments });
    content = await (await request(`page/transcript.${format}`, { method: "POST", headers, body })).text();
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "text/plain" }));
  link.download = `${name}.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
