// Answers texts as an application in Node would: node answers.mjs PARENT FOLDER TEXTS ANSWERS
import fs from 'node:fs';
import { AutoTokenizer, env, pipeline } from '@huggingface/transformers';
import * as ort from 'onnxruntime-node';

const [parent, folder, texts, answers] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = parent;
const classify = await pipeline('text-classification', folder);
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const session = await ort.InferenceSession.create(`${parent}/${folder}/onnx/model.onnx`);
const found = [];
for (const text of JSON.parse(fs.readFileSync(texts, 'utf-8'))) {
  const [first, second] = Array.isArray(text) ? text : [text, null];
  const encoded = tokenizer(first, { text_pair: second, truncation: true, return_token_type_ids: true });
  const feeds = {};
  for (const name of session.inputNames)
    feeds[name] = new ort.Tensor('int64', encoded[name].data, encoded[name].dims);
  const { logits, exit } = await session.run(feeds);
  const answer = { logits: [...logits.data], exit: Number(exit.data[0]) };
  found.push(second === null ? { ...answer, ...(await classify(first))[0] } : answer);
}
fs.writeFileSync(answers, JSON.stringify(found));
