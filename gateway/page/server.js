/** Requests to the server that the page comes from. The API key is kept in memory only. */

/** Prefix of the WebSocket subprotocol that carries a key, since a page cannot set headers. */
const KEY_SUBPROTOCOL = "openai-insecure-api-key.";

/** Lifetime of a secret, in seconds; one is created for each connection. */
const SECRET_SECS = 60;

/** Time for a secret to come, in milliseconds. */
const SECRET_MS = 10_000;

let key = "";

/** An error of the API, or of the way to it. */
export class ServerError extends Error {
  constructor({ message, code = "unknown", retryable = false, retry_after_ms: retryAfterMs = null }) {
    super(message);
    this.code = code;
    this.retryable = retryable;
    this.retryAfterMs = retryAfterMs;
  }

  /** Return the error of a response's body. */
  static read(status, text) {
    try {
      return new ServerError(JSON.parse(text).error);
    } catch {
      return new ServerError({ message: `The server answered with HTTP ${status}.`, retryable: status >= 500 });
    }
  }

  /** Return the error of a connection that failed. */
  static unreachable() {
    return new ServerError({ message: "The server cannot be reached.", code: "unreachable", retryable: true });
  }
}

/** Set the API key of later requests; empty for none. */
export function setKey(text) {
  key = text.trim();
}

/** Return the URL of a path of the server, also behind a proxy with a prefix. */
export const serverUrl = (path) => new URL(path, document.baseURI);

/** Return the headers that authorise a request. */
export const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Send a request; throw a ServerError unless it succeeds. */
export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(serverUrl(path), { ...options, headers: { ...authorization(), ...options.headers } });
  } catch {
    throw ServerError.unreachable();
  }
  if (!response.ok) {
    throw ServerError.read(response.status, await response.text());
  }
  return response;
}

/** Return the names of the models, each with whether it is ready. */
export async function readModels() {
  try {
    const response = await fetch(serverUrl("health/ready")); // 503 has a body too
    return (await response.json()).models;
  } catch {
    throw ServerError.unreachable();
  }
}

/** Open a stream of a model. A secret that expires stands for the API key, which may have characters that no subprotocol has. */
export async function openStream(model, latency) {
  const body = JSON.stringify({ expires_after: { anchor: "created_at", seconds: SECRET_SECS } });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body };
  const response = await request("v1/realtime/client_secrets", { ...options, signal: AbortSignal.timeout(SECRET_MS) });
  const { value } = await response.json();
  const url = serverUrl(`v2/decode/stream/${encodeURIComponent(model)}`);
  url.protocol = url.protocol.replace("http", "ws");
  if (latency) {
    url.searchParams.set("latency", latency);
  }
  const socket = new WebSocket(url, ["amira.v3", KEY_SUBPROTOCOL + value]);
  socket.binaryType = "arraybuffer";
  return socket;
}
