"""What of the launcher's environment ranks get, and that the preflight sees just that and says what was missed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from hvd_hetero.config.load import load
from hvd_hetero.errors import ConfigError, UserError
from hvd_hetero.launch.environment import as_ranks, for_ranks

Launched = Callable[..., tuple[int, str, str]]
PASSED = [
    "PATH", "HOME", "PYTHONPATH", "HVD_HETERO_DATA", "NCCL_DEBUG", "HOROVOD_LOG_LEVEL", "OMP_NUM_THREADS", "CUDA_HOME",
    "CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "HF_HOME", "HF_HUB_OFFLINE", "TMPDIR", "LC_ALL",
    "TRANSFORMERS_CACHE", "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME", "WANDB_MODE", "MLFLOW_TRACKING_URI", "NO_PROXY",
    "HTTPS_PROXY", "http_proxy", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_SUBMIT_DIR",
]
KEPT = [
    "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD", "HVD_HETERO_TOKEN", "PYTHON_PASSWD", "XPATH",
    "GOOGLE_APPLICATION_CREDENTIALS", "HOROVOD_SECRET", "TORCH_APIKEY", "DATABASE_URL", "MLFLOW_TRACKING_PASSWORD",
    "TORCHINDUCTOR_REDIS_URL", "NVIDIA_NGC_KEY", "TRITON_AUTH", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "MY_X",
    "SLURM_LOCALID", "SLURM_CPU_BIND", "LSB_JOBID", "OMPI_COMM_WORLD_RANK",
]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables, and those that stand for a kind to ``x``."""

    def put(*names: str, **values: str) -> None:
        for name, value in {**dict.fromkeys(names, "x"), **values}.items():
            monkeypatch.setenv(name, value)

    return put


def passed(*patterns: str) -> dict[str, str]:
    return for_ranks(load((), {"launch.environment": list(patterns), "run.seed": 7}))


# ---- what goes along ------------------------------------------------------------------------------------------------


def test_what_ranks_get_without_asking(variables: Callable[..., None]) -> None:
    variables(*PASSED, *KEPT)
    found = passed()
    assert {*PASSED} <= found.keys()
    assert not found.keys() & {*KEPT}


def test_what_is_asked_for_goes_along(variables: Callable[..., None]) -> None:
    variables("MY_X", "YOUR_X", "MY_TOKEN", "HF_TOKEN", **{"MY weird(": "x"})
    assert passed("MY_*").keys() - passed().keys() == {"MY_X"}, "a pattern may match secrets that are not meant"
    assert passed("YOUR_X", "MY_TOKEN", "NOT_SET").keys() - passed().keys() == {"YOUR_X", "MY_TOKEN"}
    assert "MY weird(" not in passed("*") and "YOUR_X" in passed("*")


def test_a_password_in_a_value_makes_a_secret(variables: Callable[..., None]) -> None:
    variables(HTTPS_PROXY="http://me:hunter2@proxy:3128", MLFLOW_TRACKING_URI="https://host/x", HF_ENDPOINT="https://t@h")
    assert passed().keys() & {"HTTPS_PROXY", "MLFLOW_TRACKING_URI", "HF_ENDPOINT"} == {"MLFLOW_TRACKING_URI"}
    assert passed("HTTPS_PROXY")["HTTPS_PROXY"] == "http://me:hunter2@proxy:3128"


def test_all_ranks_have_one_seed_of_hashes(variables: Callable[..., None]) -> None:
    for value, wanted in (("", "7"), ("3", "3"), ("random", "random")):
        variables(PYTHONHASHSEED=value)
        assert passed()["PYTHONHASHSEED"] == wanted


@pytest.mark.parametrize("text", ["[MY_X=3]", "['']", "[a b]", "[$X]"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ConfigError, match="launch.environment=.*is no variable's name; give names or patterns"):
        load((), [f"launch.environment={text}"])


def test_a_single_text_is_no_list() -> None:
    with pytest.raises(ConfigError, match=r"launch.environment='MY_X': has the wrong type; give a list, \[A, B\]"):
        load((), ["launch.environment=MY_X"])


def test_no_secret_goes_to_another_host(launched: Launched, variables: Callable[..., None]) -> None:
    variables("HF_TOKEN")
    words = ["launch.environment=[HF_TOKEN]", "data.target=own_parts:few_samples", "train.tau={fast: 8, slow: 4}"]
    status, _, err = launched(*words, "cluster.hosts=127.0.0.2:2")
    assert status == 2 and err.startswith("hvd-hetero: error: launch.environment='HF_TOKEN': is a secret"), err


# ---- what the preflight sees ----------------------------------------------------------------------------------------

SMALL = ["train.tau={fast: 8, slow: 4}", "train.batch_size=2"]


def test_what_is_missing_is_named_with_its_remedy(launched: Launched, variables: Callable[..., None]) -> None:
    variables("MY_DATA_DIR", "MY_OTHER")
    status, _, err = launched(*SMALL, "data.target=surroundings:needs_folder", "launch.environment=[MY_O*]")
    assert status == 2 and err.count("\n") == 1
    assert "KeyError: 'MY_DATA_DIR' (surroundings.py, line " in err
    assert err.endswith("launch does not pass MY_DATA_DIR on to ranks, though it is set here and looked for; "
                        "launch.environment=[MY_O*,MY_DATA_DIR] passes it on\n")
    assert os.environ["MY_DATA_DIR"] == "x", "the launcher's own environment is as it was"


def test_a_variable_that_is_not_set_at_all_is_no_matter_of_launch(launched: Launched) -> None:
    status, _, err = launched(*SMALL, "data.target=surroundings:needs_folder")
    assert status == 2 and "KeyError: 'MY_DATA_DIR'" in err and "launch does not pass" not in err


def test_another_error_keeps_its_remedy(launched: Launched, variables: Callable[..., None]) -> None:
    variables("MY_MODE")
    words = [*SMALL, "data.target=surroundings:may_have_mode"]
    status, _, err = launched(*words, "train.optimizer=LBFGS")
    assert status == 2 and "along a gradient" in err and err.endswith("launch.environment=[MY_MODE] passes it on\n")
    status, _, err = launched(*words, "data.args={n: 3}")
    assert status == 2 and "unknown argument" in err and "MY_MODE" not in err, "nobody has looked for it yet"


def test_a_reference_in_a_file_is_read_as_ranks_will(launched: Launched, variables: Callable[..., None]) -> None:
    variables("MY_ROOT", "MY_NAME")
    status, _, err = launched(*SMALL, "data.root=${oc.env:MY_ROOT}")
    assert status == 2 and "data.root='${oc.env:MY_ROOT}'" in err and "launch.environment=[MY_ROOT] passes it on" in err


def test_what_was_missed_in_silence_is_said(variables: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """By the user's code or file, not by libraries, which look for much; what is set meanwhile is not missed."""
    variables("MY_MODE", "MY_ROOT", "MY_OWN", "DOTENV_X", "MY_DATA_DIR", PATH=os.environ["PATH"])
    words = ["data.root=${oc.env:MY_ROOT,there}"]
    config = load((), words)
    assert config.data.root == "x"
    with as_ranks(config):
        assert load((), words).data.root == "there"
        assert os.environ.get("MY_MODE") is None and "MY_DATA_DIR" not in os.environ
        os.environ["MY_OWN"] = "mine"
        assert os.environ["MY_OWN"] == "mine" and os.environ["PATH"]
    assert os.environ["MY_MODE"] == os.environ["MY_OWN"] == "x" and type(os.environ).__name__ == "_Environ"
    assert capsys.readouterr().err == (
        "hvd-hetero: launch does not pass MY_ROOT, MY_MODE, MY_DATA_DIR on to ranks, though they are set here and "
        "looked for; launch.environment=[MY_ROOT,MY_MODE,MY_DATA_DIR] passes them on\n"
    )


def test_what_a_library_looks_for_is_told_only_with_an_error_that_names_it(
    variables: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    import tempfile

    variables("TEMP")
    config = load()
    with as_ranks(config):
        tempfile._candidate_tempdir_list()  # type: ignore[attr-defined]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="no place; launch does not pass TEMP on"), as_ranks(config):
        tempfile._candidate_tempdir_list()  # type: ignore[attr-defined]
        raise UserError("neither TMPDIR nor TEMP: no place")
    assert os.environ["TEMP"] == "x"
