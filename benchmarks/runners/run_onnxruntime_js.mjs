// Logits of an ONNX file by onnxruntime-web or onnxruntime-node, whichever is installed in the working folder.
// Protocol: benchmarks/runtimes.py. Layers are not reported.
// Settings: default, disabled (no graph optimisation).
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [file, imagesFile, logitsFile, , setting = "default"] = process.argv.slice(2);
const name = ["onnxruntime-node", "onnxruntime-web"].find((each) => existsSync(join("node_modules", each)));
const installed = createRequire(join(process.cwd(), "package.json"));

function readFloat32(path) {
  const bytes = readFileSync(path);
  const header = bytes.subarray(10, 10 + bytes.readUInt16LE(8)).toString("latin1");
  if (bytes[6] !== 1 || !header.includes("'<f4'") || !header.includes("False")) {
    throw new Error(`${path}: no version 1 .npy file of float32 in C order: ${header}`);
  }
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((each) => each.trim()).map(Number);
  const start = 10 + bytes.readUInt16LE(8);
  return { shape, values: new Float32Array(bytes.buffer.slice(bytes.byteOffset + start)) };
}

function writeFloat32(path, values, shape) {
  const text = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  const header = text + " ".repeat(63 - ((10 + text.length) % 64)) + "\n";
  const start = Buffer.alloc(10);
  start.write("\x93NUMPY\x01\x00", "latin1");
  start.writeUInt16LE(header.length, 8);
  const body = Buffer.from(values.buffer, values.byteOffset, values.byteLength);
  writeFileSync(path, Buffer.concat([start, Buffer.from(header), body]));
}

try {
  const runtime = installed(name);
  if (runtime.env?.wasm) runtime.env.wasm.numThreads = 1; // its worker threads keep Node.js from ending
  const options = { graphOptimizationLevel: setting === "disabled" ? "disabled" : "all", logSeverityLevel: 4 };
  const session = await runtime.InferenceSession.create(readFileSync(file), options);
  const { shape, values } = readFloat32(imagesFile);
  const tensor = new runtime.Tensor("float32", values, shape);
  const logits = (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]];
  writeFloat32(logitsFile, logits.data, logits.dims);
  const version = JSON.parse(readFileSync(join("node_modules", name, "package.json"))).version;
  console.log(JSON.stringify({ version, integer_layers: null, float_layers: null }));
} catch (error) {
  console.error(String(error?.message ?? error).split("\n")[0]);
  process.exit(1);
}
