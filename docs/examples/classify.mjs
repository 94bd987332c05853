// Classifies texts, one a line: node classify.mjs web < texts.txt
// Before: ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node @huggingface/tokenizers
// (the variable leaves out CUDA, which is large)
import { readFileSync } from 'node:fs';
import { Tokenizer } from '@huggingface/tokenizers';
import * as ort from 'onnxruntime-node';

const folder = process.argv[2] ?? 'web';
const read = (name) => JSON.parse(readFileSync(`${folder}/${name}`, 'utf-8'));
const { id2label } = read('config.json');
const settings = read('tokenizer_config.json');
const tokenizer = new Tokenizer(read('tokenizer.json'), settings);
const session = await ort.InferenceSession.create(`${folder}/onnx/model.onnx`);

const most = settings.model_max_length;
// A text that is too long keeps its last special token.
const cut = (ids) => (ids.length > most ? [...ids.slice(0, most - 1), ids.at(-1)] : ids);

// One batch: its rows are padded on the right, and each leaves at its own exit.
const classify = async (texts) => {
  const rows = texts.map((text) => tokenizer.encode(text, { return_token_type_ids: true }));
  const longest = Math.min(most, Math.max(...rows.map((row) => row.ids.length)));
  const feeds = {};
  for (const name of session.inputNames) {
    const padded = rows.flatMap((row) => {
      const ids = cut(name === 'input_ids' ? row.ids : row[name]);
      return [...ids, ...Array(longest - ids.length).fill(0)];
    });
    feeds[name] = new ort.Tensor('int64', padded, [rows.length, longest]);
  }
  const { logits, exit } = await session.run(feeds);
  const labels = logits.dims[1];
  return rows.map((_, row) => {
    const own = logits.data.slice(row * labels, (row + 1) * labels);
    return `${id2label[own.indexOf(Math.max(...own))]} from exit ${exit.data[row]}`;
  });
};

const texts = readFileSync(0, 'utf-8').replace(/\n$/, '').split('\n');
for (let start = 0; start < texts.length; start += 32)
  console.log((await classify(texts.slice(start, start + 32))).join('\n'));
