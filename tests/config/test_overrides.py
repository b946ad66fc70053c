"""``key=value`` on a command line: what is a file, and that values keep every character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvd_hetero.config.load import load
from hvd_hetero.config.overrides import is_setting, parse_override
from hvd_hetero.errors import ConfigError

ODD = ["/data/a=b/c#d", "/x y", " /x", "a #b", "#5", "007", "1e-3", "1:30", "~", "~/x", "a: b", "*.txt", "&a x",
       "a, b", "it's", 'say "x"', "数据", "a\\b", "$HOME `x` ; |", "two\nlines", "x\n y", "- x", "> x", "%x", "@x",
       "<<", "[1] x"]
"""Texts in which YAML sees something else."""


@pytest.mark.parametrize("word", [*ODD, "{a", "'a' b", "NO", "1_000", "0.10", "true", "2024-01-01"])
def test_a_text_is_taken_as_it_stands(word: str) -> None:
    assert load((), [f"data.root={word}"]).data.root == word
    assert load((), [f"run.dir={word}", f"train.loss={word}"]).train.loss == word


@pytest.mark.parametrize("word", [word for word in ODD if word not in ("1e-3", "~", "[1] x")])
def test_an_argument_is_a_text_where_yaml_would_change_it(word: str) -> None:
    assert load((), [f"model.args.name={word}"]).model.args == {"name": word}


@pytest.mark.parametrize(("word", "value"), [
    ("5", 5), ("-1", -1), ("0", 0), ("+3", 3), ("0.5", 0.5), ("1e-3", 0.001), (".5", 0.5), ("0x1F", 31), (" 3 ", 3),
    ("true", True), ("off", False), ("null", None), ("", None), ("~", None), ('"#5"', "#5"), ("'007'", "007"),
    ("{betas: [0.9,0.99]}", {"betas": [0.9, 0.99]}), (" [1, 'a#b'] ", [1, "a#b"]), ("!!str 5", "5"),
])
def test_what_is_yaml_stays_yaml(word: str, value: Any) -> None:
    assert parse_override(f"model.args.x={word}") == ("model.args.x", value)


@pytest.mark.parametrize("word", ["[1, 2] # two", '"a" # b', "{a: 1}\nb: 2", "{a: 1", "'a", "!a b: c"])
def test_yaml_of_which_a_part_would_be_dropped_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="is not a YAML value; quote it"):
        parse_override(f"model.args.x={word}")


def test_quotes_around_the_whole_are_no_part_of_a_text() -> None:
    assert load((), ['data.root="/x #y"', "run.dir='007'", "run.name=null"]).data.root == "/x #y"
    assert load((), ["run.dir='007'"]).run.dir == "007"
    assert load((), ["data.root=null", "run.dir="]).data.root is None


def test_references_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "/a #b")
    for key in ("data.root", "data.args.x"):
        assert parse_override(f"{key}=${{oc.env:SOME_FOLDER}}/c: d") == (key, "/a #b/c: d")
        assert parse_override(rf"{key}=\${{x}}") == (key, "${x}")
        with pytest.raises(ConfigError, match=r"cannot be resolved.*correct what stands in \$"):
            parse_override(f"{key}=${{nothing.there}}")


def test_a_word_is_a_file_if_the_file_exists_or_the_key_would_be_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweeps/lr=0.1").mkdir(parents=True)
    for name in ("sweeps/lr=0.1/c.yaml", "lr=0.1.yaml"):
        Path(name).write_text("train: {epochs: 3}")
        assert not is_setting(name) and load([name]).train.epochs == 3
    for name in ("sweeps/lr=0.1/typo.yaml", "/lr=0.1", "./a=b", "c.yaml"):
        assert not is_setting(name), "it is to be missed as a file, not as a key"
    for word in ("run.dir=/a=b/c", "lr=0.2.yaml", "=3", "data.root=" + 5000 * "x"):
        assert is_setting(word)


def test_a_base_is_found_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "lr=0.1 #2").mkdir()
    (tmp_path / "lr=0.1 #2" / "b.yaml").write_text("train: {epochs: 3}")
    (tmp_path / "c.yaml").write_text("base: 'lr=0.1 #2/b.yaml'")
    assert load([tmp_path / "c.yaml"]).train.epochs == 3
