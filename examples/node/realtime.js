// Transcribe a stream with OpenAI's client, whose realtime sessions need TLS:
//   NODE_EXTRA_CA_CERTS=server.pem node examples/node/realtime.js speech.pcm [BASE_URL]
// speech.pcm is 24 kHz 16-bit mono PCM. First: npm ci --prefix examples/node
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { OpenAIRealtimeWS } from "openai/realtime/ws";

const PIECE_BYTES = 4800; // 100 ms

const [recording = "speech.pcm", baseURL = "https://localhost:8057/v1"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: process.env.AMIRA_API_KEY ?? "unused" });
const session = new OpenAIRealtimeWS({ model: "gpt-4o-transcribe" }, client);
let pending = 0;
let cleared = false;

session.on("session.created", () => {
  session.send({ type: "session.update", session: { type: "transcription", audio: { input: { turn_detection: { type: "server_vad" } } } } });
});
session.on("session.updated", () => {
  const audio = readFileSync(recording);
  for (let at = 0; at < audio.length; at += PIECE_BYTES) {
    session.send({ type: "input_audio_buffer.append", audio: audio.subarray(at, at + PIECE_BYTES).toString("base64") });
  }
  session.send({ type: "input_audio_buffer.commit" });
  session.send({ type: "input_audio_buffer.clear" });
});
session.on("input_audio_buffer.committed", () => pending++);
session.on("input_audio_buffer.cleared", () => {
  cleared = true;
  leave();
});
session.on("conversation.item.input_audio_transcription.completed", (event) => {
  if (event.transcript) console.log(event.transcript);
  pending--;
  leave();
});
session.on("error", (error) => {
  if (error.error?.code !== "input_audio_buffer_commit_empty") throw error;
});

function leave() {
  if (cleared && pending === 0) session.close();
}
