/** Transcribe a file: its upload, and its segments as they are decoded (newline-delimited JSON). */

import { authorization, ServerError, serverUrl } from "./server.js";

export class Recording {
  #request = new XMLHttpRequest(); // fetch reports no progress of an upload
  #read = 0; // characters of the answer that were taken
  #handlers;
  #summary = null;

  /** @param {{ onUpload: Function, onSegment: Function }} handlers take the uploaded share (0 to 1), and each segment */
  constructor(handlers) {
    this.#handlers = handlers;
  }

  /** Send a file; return the last line of the answer, which describes the whole recording. */
  transcribe(file, model) {
    const request = this.#request;
    const url = serverUrl(`v2/decode/batch/${encodeURIComponent(model)}`);
    url.searchParams.set("format", "ndjson");
    request.open("POST", url);
    request.setRequestHeader("Content-Type", "application/octet-stream"); // the server recognises the content
    Object.entries(authorization()).forEach(([name, value]) => request.setRequestHeader(name, value));
    request.upload.onprogress = ({ loaded, total }) => this.#handlers.onUpload(loaded / total);
    const done = new Promise((resolve, reject) => {
      const attempt = (action) => () => {
        try {
          action();
        } catch (error) {
          reject(error);
        }
      };
      request.onprogress = attempt(() => this.#readLines());
      request.onload = attempt(() => {
        this.#readLines();
        resolve(this.#finish());
      });
      request.onerror = () => reject(ServerError.unreachable());
      request.onabort = () => reject(new ServerError({ message: "The transcription was cancelled.", code: "cancelled" }));
    });
    request.send(file);
    return done;
  }

  cancel() {
    this.#request.abort();
  }

  #readLines() {
    if (this.#request.status !== 200) {
      return;
    }
    const text = this.#request.responseText;
    for (let end = text.indexOf("\n", this.#read); end >= 0; end = text.indexOf("\n", this.#read)) {
      const line = JSON.parse(text.slice(this.#read, end));
      this.#read = end + 1;
      if (line.error) {
        throw new ServerError(line.error);
      }
      if (line.type === "segment") {
        this.#handlers.onSegment(line);
      } else {
        this.#summary = line;
      }
    }
  }

  #finish() {
    const { status, responseText } = this.#request;
    if (status !== 200) {
      throw ServerError.read(status, responseText);
    }
    if (!this.#summary) {
      throw new ServerError({ message: "The answer ended early; send the file again.", code: "incomplete", retryable: true });
    }
    return this.#summary;
  }
}
