/** The microphone: devices, permission, and frames of 16-bit samples at 16 kHz mono. */

const RATE = 16000;

/** Messages for the errors of `getUserMedia`. */
const REASONS = {
  NotAllowedError: "The browser may not use the microphone. Allow it in the address bar, then press Start again.",
  NotFoundError: "No microphone was found. Connect one, then press Start again.",
  NotReadableError: "Another program uses the microphone. Close it, then press Start again.",
  OverconstrainedError: "The chosen microphone is not connected any more. Choose another one.",
};

const INSECURE =
  "Browsers give a page the microphone only over HTTPS or from localhost. Open this page as http://localhost, or set tls_certificate.";

/** Return the microphones, as { id, label }; labels are empty until the microphone was allowed. */
export async function listMicrophones() {
  const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return devices
    .filter(({ kind, deviceId }) => kind === "audioinput" && deviceId !== "default")
    .map(({ deviceId, label }) => ({ id: deviceId, label }));
}

/** Call a function when a microphone is connected or disconnected. */
export const onDevicesChange = (call) => navigator.mediaDevices?.addEventListener("devicechange", call);

export class Microphone {
  #track;
  #context;
  #capture;
  #stopped;

  constructor(track, context, capture) {
    this.#track = track;
    this.#context = context;
    this.#capture = capture;
  }

  /**
   * Open a microphone.
   *
   * @param {string} id its device id; empty for the browser's choice
   * @param {{ onSamples: Function, onMuted: Function, onLost: Function }} handlers take samples (Int16Array) with their peak
   *   (0 to 1), whether the system mutes the microphone, and the loss of the device
   */
  static async open(id, handlers) {
    const stream = await askForMicrophone(id);
    const [track] = stream.getAudioTracks();
    let context;
    try {
      context = await startContext(stream, RATE).catch(() => startContext(stream)); // Firefox resamples no microphone
      const capture = new AudioWorkletNode(context.audio, "capture", { channelCount: 1, channelCountMode: "explicit" });
      context.source.connect(capture).connect(context.audio.destination); // silent, but some browsers run no other node
      const microphone = new Microphone(track, context.audio, capture);
      microphone.#listen(handlers);
      return microphone;
    } catch (error) {
      track.stop();
      await context?.audio.close();
      throw error;
    }
  }

  #listen({ onSamples, onMuted, onLost }) {
    this.#stopped = new Promise((resolve) => {
      this.#capture.port.onmessage = ({ data }) => (data ? onSamples(data.samples, data.peak) : resolve());
    });
    this.#track.onmute = () => onMuted(true);
    this.#track.onunmute = () => onMuted(false);
    this.#track.onended = onLost;
  }

  /** Stop; the last samples are delivered before this returns. */
  async stop() {
    this.#track.onended = null;
    this.#capture.port.postMessage("stop");
    const late = new Promise((resolve) => { setTimeout(resolve, 500); }); // a suspended context answers nothing
    await Promise.race([this.#stopped, late]);
    this.#track.stop();
    await this.#context.close();
  }
}

async function askForMicrophone(id) {
  if (!navigator.mediaDevices) {
    throw new Error(INSECURE);
  }
  // Recognisers are trained on unprocessed speech; only the level is adapted.
  const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: true, channelCount: 1 };
  if (id) {
    audio.deviceId = { exact: id };
  }
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(REASONS[error.name] ?? `The microphone cannot be used: ${error.message}`);
  }
}

/** Start an audio context with the microphone as a source; without a rate it has that of the device. */
async function startContext(stream, rate) {
  const audio = new AudioContext(rate ? { sampleRate: rate } : {});
  try {
    const source = audio.createMediaStreamSource(stream);
    await audio.audioWorklet.addModule(new URL("capture-worklet.js", import.meta.url));
    await audio.resume();
    return { audio, source };
  } catch (error) {
    await audio.close();
    throw error;
  }
}
