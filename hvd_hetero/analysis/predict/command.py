"""``hvd-hetero plan``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from hvd_hetero import algorithms
from hvd_hetero.analysis.predict.advice import batches, recommended, sweep, together, worth
from hvd_hetero.analysis.predict.predict import Scenario
from hvd_hetero.analysis.predict.roles import roles
from hvd_hetero.analysis.predict.speeds import Assumptions, gather
from hvd_hetero.analysis.predict.start import start_of
from hvd_hetero.analysis.predict.tables import Forecast, as_json, as_text
from hvd_hetero.config.load import load, without_roles
from hvd_hetero.errors import ConfigError
from hvd_hetero.files import check_writable, write_text

NO_PICTURES = "No pictures: matplotlib is not installed (pip install 'hvd-hetero[report]')."


def plan(files: Sequence[str], overrides: Sequence[str], assumed: Assumptions, out: str | None = None) -> None:
    """Predict what each method would take, and print it; write ``table.json`` and pictures into a folder.

    Raises:
        ConfigError: something given is missing or cannot be, or the folder cannot be written.
    """
    if out is not None:
        check_writable("--out", Path(out))
    config = without_roles(load(files, overrides, algorithms.method))  # what a class is worth in each is told
    inputs = gather(config, assumed)
    scenario = Scenario(config, inputs)
    rows = sweep(scenario)
    advice = recommended(scenario, rows)
    if advice is None:
        problem = next(row.problem for _, row in reversed(rows))
        raise ConfigError("train.tau", config.train.tau, f"no tau can be planned: {problem}", "change what it names")
    added = worth(scenario, advice.tau)
    forecast = Forecast(
        scenario, scenario.methods(), rows, advice, batches(scenario), added, together(scenario, advice.tau),
        start_of(inputs.cluster, inputs.cores, inputs.link, inputs.model_bytes),
        roles(scenario, added, assumed.test_samples),
    )  # fmt: skip
    print(as_text(forecast))
    if out is not None:
        print(_write(Path(out), forecast))


def _write(folder: Path, forecast: Forecast) -> str:
    """Write everything into a folder; return a sentence about it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.json", json.dumps(as_json(forecast), indent=2) + "\n")
        if importlib.util.find_spec("matplotlib") is None:
            return f"\n{folder / 'table.json'}\n{NO_PICTURES}"
        from hvd_hetero.analysis.predict.pictures import draw

        return "\n" + "\n".join(map(str, [folder / "table.json", *draw(forecast, folder)]))
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError("--out", str(folder), problem, "choose another folder") from error
