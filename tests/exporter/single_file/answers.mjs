// Answers texts as an application in Node would: node answers.mjs PARENT FOLDER TEXTS ANSWERS
// Each text by itself, and all of them in one batch.
import fs from 'node:fs';
import { AutoTokenizer, env, pipeline } from '@huggingface/transformers';
import * as ort from 'onnxruntime-node';

const [parent, folder, texts, answers] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = parent;
const classify = await pipeline('text-classification', folder);
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const session = await ort.InferenceSession.create(`${parent}/${folder}/onnx/model.onnx`);

const answered = async (batch) => {
  const isPair = Array.isArray(batch[0]);
  const first = isPair ? batch.map((pair) => pair[0]) : batch;
  const encoded = tokenizer(first, {
    text_pair: isPair ? batch.map((pair) => pair[1]) : null,
    padding: true,
    truncation: true,
    return_token_type_ids: true,
  });
  const feeds = {};
  for (const name of session.inputNames)
    feeds[name] = new ort.Tensor('int64', encoded[name].data, encoded[name].dims);
  const { logits, exit } = await session.run(feeds);
  const labels = isPair ? [] : await classify(first);
  const width = logits.dims[1];
  return batch.map((_, row) => ({
    logits: [...logits.data.slice(row * width, (row + 1) * width)],
    exit: Number(exit.data[row]),
    ...labels[row],
  }));
};

const given = JSON.parse(fs.readFileSync(texts, 'utf-8'));
const alone = [];
for (const text of given) alone.push(...(await answered([text])));
fs.writeFileSync(answers, JSON.stringify({ alone, batch: await answered(given) }));
