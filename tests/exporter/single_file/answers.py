"""Answers texts in one batch, with ONNX Runtime and the tokenizer: answers.py FOLDER TEXTS."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder, texts = map(Path, sys.argv[1:])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding()
file = next(folder.rglob("model*.onnx"))
session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
rows = tokenizer.encode_batch(json.loads(texts.read_text()))
tensors = {
    "input_ids": [row.ids for row in rows],
    "attention_mask": [row.attention_mask for row in rows],
    "token_type_ids": [row.type_ids for row in rows],
}
names = [each.name for each in session.get_inputs()]
logits, exits = session.run(["logits", "exit"], {name: np.array(tensors[name]) for name in names})
answers = zip(logits.tolist(), exits.tolist(), strict=True)
print(json.dumps([{"logits": own, "exit": number} for own, number in answers]))
