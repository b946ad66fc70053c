"""Text: AG News, tokenized once into tensors of fixed length."""

from __future__ import annotations

import csv
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from hvd_hetero.config.instantiate import import_transformers
from hvd_hetero.data.files import class_numbers, corrupt, folder_with, missing, reading
from hvd_hetero.data.split import Split, Splits
from hvd_hetero.errors import ConfigError

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
PADDING, START, FIRST_WORD = 0, 1, 2


def ag_news(root: Path, tokenizer: str = "hash", max_length: int = 128, vocab_size: int = 30522) -> Splits:
    """AG News: ``input_ids`` and ``attention_mask`` ``[N, max_length]`` of title and description; 4 classes.

    Args:
        root: holds ``ag_news_csv`` with ``train.csv`` and ``test.csv``, or the packed ``ag_news_*.csv.xz``.
        tokenizer: local folder of a tokenizer of the transformers library, or ``hash``: each word is numbered
            by a checksum, which needs no files.
        max_length: tokens of a text; longer ones are cut, shorter ones padded.
        vocab_size: number of tokens of ``hash``; a folder has its own.

    Raises:
        ConfigError: missing or corrupt files, no such tokenizer, or the extra ``nlp`` is not installed.
    """
    for name, value, least in (("max_length", max_length, 2), ("vocab_size", vocab_size, FIRST_WORD + 1)):
        if value < least:
            raise ConfigError(f"data.args.{name}", value, f"must be at least {least}", "give a larger number")
    hashing = tokenizer == "hash"
    tokenize = _hashing(max_length, vocab_size) if hashing else _from_folder(tokenizer, max_length)
    paths, read = _find(root)

    def split(path: Path) -> Split:
        with reading(path, "rows of a class and text"):
            labels, texts = read(path)
        targets = class_numbers(path, labels, len(texts), classes=4)
        ids, mask = tokenize(texts)
        return Split({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}, targets)

    train, test = (split(path) for path in paths)
    return Splits(train, test)


def _find(root: Path) -> tuple[list[Path], Callable[[Path], tuple[list[int], list[str]]]]:
    official = ["train.csv", "test.csv"]
    folder = folder_with(root, ["ag_news_csv", "AG_NEWS", "ag_news", "."], official)
    if folder is not None:
        return [folder / name for name in official], _read_official
    packed = ["ag_news_train.csv.xz", "ag_news_test.csv.xz"]
    folder = folder_with(root, [".", "ag_news"], packed)
    if folder is not None:
        return [folder / name for name in packed], _read_packed
    raise missing(root, f"ag_news_csv with {' and '.join(official)}, or the packed {' and '.join(packed)}")


def _read_official(path: Path) -> tuple[list[int], list[str]]:
    """Read rows of class (from 1), title and description, without a header or with one that says so."""
    labels, texts = [], []
    with path.open(encoding="utf8", newline="") as file:
        rows = csv.reader(file)
        for row in rows:
            if rows.line_num == 1 and row[:1] == ["Class Index"]:
                continue
            if len(row) != 3 or not row[0].isdigit():
                raise corrupt(path, f"line {rows.line_num}: {row[:1]}", "class, title, description")
            labels.append(int(row[0]) - 1)
            texts.append(f"{row[1]} {row[2]}")
    return labels, texts


def _read_packed(path: Path) -> tuple[list[int], list[str]]:
    """Read rows of label (from 0) and text under a header."""
    with lzma.open(path) as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf8", newline="")))
    return [int(row["label"]) for row in rows], [row["text"] for row in rows]


def _hashing(max_length: int, vocab_size: int) -> Tokenize:
    pattern = re.compile(r"\w+|[^\w\s]")
    numbers = vocab_size - FIRST_WORD

    def tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        words = (pattern.findall(text.lower())[: max_length - 1] for text in texts)
        # Python's own hash differs from process to process; a checksum does not.
        rows = ([START, *(FIRST_WORD + zlib.crc32(word.encode()) % numbers for word in row)] for row in words)
        return _padded(rows, len(texts), max_length)

    return tokenize


def _padded(rows: Iterable[Sequence[int]], count: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((count, max_length), PADDING, dtype=np.int32)
    mask = np.zeros((count, max_length), dtype=np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def _from_folder(folder: str, max_length: int) -> Tokenize:
    path = Path(folder).expanduser()
    key = "data.args.tokenizer"
    if not path.is_dir():
        raise ConfigError(key, folder, "is not a folder", "give the folder of a tokenizer, or 'hash'")
    transformers = import_transformers(key, folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        problem, remedy = "holds no tokenizer", "put tokenizer.json and tokenizer_config.json there"
        raise ConfigError(key, folder, problem, remedy) from error

    def tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        out = tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_length,
                        return_tensors="np")
        return out["input_ids"].astype(np.int32), out["attention_mask"].astype(np.int32)

    return tokenize
