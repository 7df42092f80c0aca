// A judge in Node.js: node node_judge.mjs PACKAGE FOLDER FILE.onnx THREADS, driven by robustq/export/runtimes/node.py.
// FOLDER: where Node.js looks for PACKAGE first. Numbers on the pipes are little endian, 32 bits.
//   at the start     -> length, JSON {version} or {error}
//   stdin, a batch   <- type (0: float32, 1: uint8), rank, dimensions, values
//   stdout, answer   -> 0, rank, dimensions, values as float32; or 1 and the same as int64; or 2, length, error text
// stdin at its end ends the process.
import { readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const [name, folder, file, threads] = process.argv.slice(2);
console.log = console.info = console.debug = console.error; // stdout holds the answers alone

function write(bytes) {
  for (let done = 0; done < bytes.length; ) {
    try {
      done += writeSync(1, bytes, done);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error; // a full pipe
    }
  }
}

const numbers = (...values) => Buffer.from(Uint32Array.from(values).buffer);

function writeText(text, ...before) {
  const bytes = Buffer.from(text, "utf8");
  write(Buffer.concat([numbers(...before, bytes.length), bytes]));
}

function versionOf(require) {
  for (let place = dirname(require.resolve(name)); place !== dirname(place); place = dirname(place)) {
    try {
      const found = JSON.parse(readFileSync(join(place, "package.json"), "utf8"));
      if (found.name === name) return found.version;
    } catch {
      continue; // no package.json here
    }
  }
  return "of unknown version";
}

async function* batches() {
  let held = [], length = 0;
  const stream = process.stdin[Symbol.asyncIterator]();
  const take = async (count) => {
    while (length < count) {
      const { value, done } = await stream.next();
      if (done) return null;
      held.push(value);
      length += value.length;
    }
    const all = held.length === 1 ? held[0] : Buffer.concat(held);
    held = all.length > count ? [all.subarray(count)] : [];
    length = all.length - count;
    return Buffer.from(all.subarray(0, count)); // a copy: typed arrays need aligned memory of their own
  };
  for (;;) {
    const head = await take(8);
    if (head === null) return;
    const kind = head.readUInt32LE(0), rank = head.readUInt32LE(4);
    const axes = await take(4 * rank);
    const shape = Array.from({ length: rank }, (_, axis) => axes.readUInt32LE(4 * axis));
    const bytes = await take(shape.reduce((product, each) => product * each, kind === 0 ? 4 : 1));
    yield { kind, shape, bytes };
  }
}

let runtime, session;
try {
  const require = createRequire(join(folder, "package.json"));
  runtime = require(name);
  if (runtime.env?.wasm) runtime.env.wasm.numThreads = Number(threads) || 1;
  const options = { graphOptimizationLevel: "all", logSeverityLevel: 4, executionProviders: ["cpu"] };
  if (name === "onnxruntime-web") options.executionProviders = ["wasm"];
  if (name === "onnxruntime-node" && Number(threads)) options.intraOpNumThreads = Number(threads);
  session = await runtime.InferenceSession.create(readFileSync(file), options);
  writeText(JSON.stringify({ version: versionOf(require) }));
} catch (error) {
  writeText(JSON.stringify({ error: String(error?.message ?? error).split("\n")[0], code: error?.code ?? "" }));
  process.exit(1);
}
for await (const { kind, shape, bytes } of batches()) {
  try {
    const values = kind === 0 ? new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4) : new Uint8Array(bytes);
    const tensor = new runtime.Tensor(kind === 0 ? "float32" : "uint8", values, shape);
    const found = (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]];
    if (found.type !== "float32" && found.type !== "int64") throw new Error(`answers with ${found.type}`);
    const body = Buffer.from(found.data.buffer, found.data.byteOffset, found.data.byteLength);
    write(Buffer.concat([numbers(found.type === "float32" ? 0 : 1, found.dims.length, ...found.dims), body]));
  } catch (error) {
    writeText(String(error?.message ?? error).split("\n")[0], 2);
  }
}
process.exit(0);
