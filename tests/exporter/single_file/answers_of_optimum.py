"""Answers texts in one batch, with Optimum: answers_of_optimum.py FOLDER TEXTS."""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

folder, texts = map(Path, sys.argv[1:])
file = next(folder.rglob("model*.onnx"))
model = ORTModelForSequenceClassification.from_pretrained(
    folder, subfolder=str(file.parent.relative_to(folder)), file_name=file.name
)
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = tokenizer(json.loads(texts.read_text()), padding=True, truncation=True, return_tensors="pt")
print(json.dumps([{"logits": own} for own in model(**rows).logits.tolist()]))
