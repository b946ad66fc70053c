"""AG News: official and packed csv, the hashing tokenizer and one from a folder."""

from __future__ import annotations

import csv
import json
import lzma
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from data_helpers import REAL, everything, first_batch, get, real_data

from hvd_hetero.data import Dataset
from hvd_hetero.errors import ConfigError

ROWS = [(3, "Stocks up", 'Oil, "gold" and\\more'), (1, "World", "news news"), (4, "Moon", "a " * 30)]


def make_official(folder: Path, header: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.csv", "test.csv"):
        with (folder / name).open("w", encoding="utf8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([("Class Index", "Title", "Description")] * header + ROWS)


def make_packed(folder: Path) -> None:
    for name in ("train", "test"):
        with lzma.open(folder / f"ag_news_{name}.csv.xz", "wt", encoding="utf8", newline="") as file:
            csv.writer(file).writerows([("label", "text"), *((c - 1, f"{t} {d}") for c, t, d in ROWS)])


def tokens(data: Dataset) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    inputs, targets = everything(data.train)
    return inputs["input_ids"], inputs["attention_mask"], targets.tolist()


@pytest.mark.parametrize("folder", ["ag_news_csv", "AG_NEWS", "."])
@pytest.mark.parametrize("header", [False, True])
def test_official_and_packed_files_give_the_same_tensors(tmp_path: Path, folder: str, header: bool) -> None:
    (tmp_path / "packed").mkdir()
    make_official(tmp_path / "official" / folder, header)
    make_packed(tmp_path / "packed")
    official = tokens(get("ag_news", tmp_path / "official", max_length=12, vocab_size=1000))
    packed = tokens(get("ag_news", tmp_path / "packed", max_length=12, vocab_size=1000))
    assert torch.equal(official[0], packed[0]) and torch.equal(official[1], packed[1])
    assert official[2] == packed[2] == [2, 0, 3]


def test_hashing_numbers_words_alike_whatever_their_case(tmp_path: Path) -> None:
    make_official(tmp_path)
    ids, mask, _ = tokens(get("ag_news", tmp_path, max_length=12, vocab_size=1000))
    assert ids.shape == mask.shape == (3, 12)
    assert mask.sum(1).tolist() == [11, 4, 12], "start, words and signs; the third is cut"
    assert ids[1, 2] == ids[1, 3] and ids[1, 1] != ids[1, 2]
    assert (ids[:, 0] == 1).all() and (ids[mask == 0] == 0).all()
    words = ids[:, 1:][mask[:, 1:] == 1]
    assert words.min() >= 2 and words.max() < 1000
    batch, targets = first_batch(get("ag_news", tmp_path, max_length=12).test, [1, 1])
    assert sorted(batch) == ["attention_mask", "input_ids"] and targets.tolist() == [0, 0]


def test_crowded_vocabulary_stays_inside(tmp_path: Path) -> None:
    make_official(tmp_path)
    ids, _, _ = tokens(get("ag_news", tmp_path, vocab_size=3))
    assert ids.max() == 2 and ids.shape == (3, 128)


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra nlp is not installed")
def test_tokenizer_from_a_local_folder(tmp_path: Path) -> None:
    make_official(tmp_path / "data")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "world", "news"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    ids, mask, _ = tokens(get("ag_news", tmp_path / "data", tokenizer=str(folder), max_length=8))
    assert ids[1].tolist() == [2, 5, 6, 6, 3, 0, 0, 0]
    assert mask[1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        get("ag_news", tmp_path / "data", tokenizer=str(empty))


def test_bad_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such dataset") as caught:
        get("ag_news", tmp_path)
    assert "train.csv" in caught.value.remedy and "ag_news_train.csv.xz" in caught.value.remedy
    make_packed(tmp_path)
    path = tmp_path / "ag_news_test.csv.xz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="truncated or corrupt") as caught:
        get("ag_news", tmp_path)
    assert caught.value.key == str(path)
    make_official(tmp_path)
    for line, message in (("5,a,b\n", r"labels in 0 \.\. 3"), ("1,a\n", "line 1"), ("World,a,b\n", "line 1")):
        (tmp_path / "test.csv").write_text(line)
        with pytest.raises(ConfigError, match=message) as caught:
            get("ag_news", tmp_path)
        assert caught.value.key == str(tmp_path / "test.csv")
    with pytest.raises(ConfigError, match="not a folder"):
        get("ag_news", tmp_path, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="at least 2"):
        get("ag_news", tmp_path, max_length=1)
    monkeypatch.setattr("hvd_hetero.config.instantiate.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hvd-hetero\[nlp\]'"):
        get("ag_news", tmp_path, tokenizer=str(tmp_path))


@real_data
def test_real_ag_news() -> None:
    data = get("ag_news", REAL, max_length=32, train_limit=4000)
    ids, mask, _ = tokens(data)
    assert ids.shape == (4000, 32) and torch.bincount(everything(data.test)[1]).tolist() == [1400] * 4
    assert mask.sum(1).float().mean() > 25
    assert len(torch.unique(ids)) > 5000, "many words"
