// Classifies texts, one a line: node classify.mjs web < texts.txt
// Before: npm install onnxruntime-node @huggingface/tokenizers --onnxruntime-node-install=skip
// (the option leaves out CUDA, which is large)
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
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

for await (const text of createInterface({ input: process.stdin })) {
  const encoded = tokenizer.encode(text, { return_token_type_ids: true });
  const tensors = { ...encoded, input_ids: encoded.ids };
  const feeds = {};
  for (const name of session.inputNames) {
    const ids = cut(tensors[name]);
    feeds[name] = new ort.Tensor('int64', ids, [1, ids.length]);
  }
  const { logits, exit } = await session.run(feeds);
  console.log(`${id2label[logits.data.indexOf(Math.max(...logits.data))]} from exit ${exit.data[0]}`);
}
