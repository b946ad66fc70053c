"""Fine-tuning a transformer of a local folder. horovodrun -np 2 python scripts/examples/transformer.py FOLDER TEXTS"""

import csv
import sys
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import hvd_hetero
from hvd_hetero.data import MapSource

folder, texts = sys.argv[1:]  # a model with its tokenizer, and a file of lines label,text
tokenizer = AutoTokenizer.from_pretrained(folder)
with open(texts) as file:
    items = [{**tokenizer(text, truncation=True), "labels": int(label)} for label, text in csv.reader(file)]
pad = DataCollatorWithPadding(tokenizer)  # each batch to the length of its longest text
half = len(items) * 4 // 5


def loss(outputs: Any, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")


def accuracy(outputs: Any, labels: Tensor) -> Tensor:
    return (outputs.logits.argmax(1) == labels).float()


model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
model.gradient_checkpointing_enable({"use_reentrant": False})
hvd_hetero.train(
    model=model, train_data=MapSource(items[:half], collate=pad), test_data=MapSource(items[half:], collate=pad),
    loss=loss, metrics={"right": accuracy},
    overrides={
        "train.optimizer": "AdamW", "train.optimizer_args": {}, "train.lr": 0.003, "train.scheduler": "linear",
        "train.scheduler_args": {"warmup": 0.1}, "train.epochs": 3, "train.batch_size": 8, "run.dir": "transformer",
        "train.tau": {"fast": 8, "slow": 1},
    },
)
