"""The example programs run as their first lines say, on two real ranks, or in one process."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.horovod

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


def run(command: list[str], folder: Path, timeout: float = 180) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.mark.slow
def test_own_model_in_a_program(tmp_path: Path) -> None:
    run([program("horovodrun"), "-np", "2", sys.executable, str(EXAMPLES / "own_model.py")], tmp_path)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    content = json.loads(summary.read_text())
    assert content["epochs"] == 20
    assert [c["tau"] for c in content["classes"]] == [16, 2]
    assert content["eval"]["final_accuracy"] > 0.9  # the larger class alone is 0.63


def test_own_loop(tmp_path: Path) -> None:
    out = run([program("horovodrun"), "-np", "2", sys.executable, str(EXAMPLES / "own_loop.py")], tmp_path)
    (line,) = [line for line in out.splitlines() if "accuracy" in line]
    assert float(line.split()[-1]) > 0.85


ROWS = {  # what has to be below, or above, in the last row
    "spirals": ("train_loss", 0.0, 0.25),  # 0.69 without learning
    "regression": ("eval_loss", 0.0, 0.75),  # 1 is what the mean alone has
    "multi_label": ("eval_all_right", 0.75, 1.0),
    "segmentation": ("eval_accuracy", 0.93, 1.0),
    "detection": ("eval_distance", 0.0, 0.4),
    "transformer": ("eval_right", 0.9, 1.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where most examples were run, in one job of two ranks."""
    folder = tmp_path_factory.mktemp("examples")
    names = ["stream_loop.py", "regression.py", "multi_label.py", "segmentation.py", "detection.py"]
    if find_spec("transformers") is not None:
        tiny_transformer(folder)
        names.append("transformer.py,tiny,texts.csv")
    script = Path(__file__).parent / "ranks" / "run_examples.py"
    run([program("horovodrun"), "-np", "2", sys.executable, str(script), *names], folder, timeout=400)
    return folder


def tiny_transformer(folder: Path) -> None:
    """A model with weights of no meaning and a tokenizer of few words, and texts in which one word tells the class."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["good", "bad", *(f"word{number}" for number in range(20))]
    (folder / "tiny").mkdir()
    (folder / "tiny" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "tiny" / "vocab.txt")).save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=32)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "tiny")
    draw = random.Random(0)
    lines = []
    for number in range(320):
        text = [draw.choice(words[2:]) for _ in range(draw.randint(2, 12))]
        text.insert(draw.randint(0, len(text)), words[number % 2])
        lines.append(f"{number % 2},{' '.join(text)}")
    (folder / "texts.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", list(ROWS))
def test_examples_learn(name: str, folder: Path) -> None:
    if name == "transformer":
        pytest.importorskip("transformers", reason="needs the extra nlp")
    row = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    key, least, most = ROWS[name]
    assert least <= row[key] <= most, row
    assert set(row["tau"]) == {"fast", "slow"}


def test_examples_are_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    del lines["method_in_one_process.py"]  # the whole method, and not a use of it
    assert max(lines.values()) <= 40, lines


def test_method_in_one_process(tmp_path: Path) -> None:
    out = run([sys.executable, str(EXAMPLES / "method_in_one_process.py")], tmp_path)
    assert float(out.split()[-1]) > 0.85


def test_own_target_in_a_configuration(tmp_path: Path) -> None:
    for file in ("own_target.py", "own_target.yaml"):
        shutil.copy(EXAMPLES / file, tmp_path)
    run([program("hvd-hetero"), "launch", "own_target.yaml", "run.dir=run"], tmp_path)
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert content["eval"]["final_accuracy"] > 0.9
    assert content["samples_seen"] == 20 * (16 + 2) * 4
