// Transcribe a recording with OpenAI's client: node examples/node/transcribe.js [RECORDING] [BASE_URL]
// First: npm ci --prefix examples/node
import { createReadStream } from "node:fs";
import OpenAI from "openai";

const [recording = "speech.wav", baseURL = "http://localhost:8057/v1"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: process.env.AMIRA_API_KEY ?? "unused" });
const ask = (options) => client.audio.transcriptions.create({ file: createReadStream(recording), model: "whisper-1", ...options });

for await (const event of await ask({ stream: true })) {
  if (event.type === "transcript.text.delta") process.stdout.write(event.delta);
}
console.log();

const timed = await ask({ response_format: "verbose_json", timestamp_granularities: ["word"] });
for (const { word, start, end } of timed.words) console.log(`${start.toFixed(2)} ${end.toFixed(2)} ${word}`);

console.log(await ask({ response_format: "srt" }));
