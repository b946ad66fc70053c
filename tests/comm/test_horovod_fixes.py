"""The fixes that our build of Horovod carries, under real horovodrun; each test fails without its fix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.horovod

PREAMBLE = """\
import os, signal, sys, time
from pathlib import Path
import torch
import horovod.torch as hvd
from horovod.common.exceptions import HorovodInternalError
torch.set_num_threads(1)
folder = Path(sys.argv[1])
"""


def horovodrun(folder: Path, hosts: str, body: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `body` on every slot of `hosts`, with `folder` as the place to leave files in.

    Returns:
        The finished process, stdout and stderr as one text.
    """
    script = folder / "worker.py"
    script.write_text(PREAMBLE + body)
    ranks = sum(int(host.rsplit(":", 1)[1]) for host in hosts.split(","))
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "--disable-cache"]
    command += ["-np", str(ranks), "-H", hosts, sys.executable, str(script), str(folder)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, env={**os.environ, **env}, timeout=120, **output)


def test_build_names_its_fixes() -> None:
    from horovod._hvd_hetero_fixes import FIXES

    assert FIXES == ("mixed-hosts", "stall-check", "survivors", "rests", "light-start")


def test_mixed_hosts(tmp_path: Path) -> None:
    """A set with one rank of the first host and both of the second; `init` used to die at the timeout."""
    done = horovodrun(
        tmp_path,
        "localhost:2,127.0.0.1:2",
        """
sets = [hvd.ProcessSet([0]), hvd.ProcessSet([1, 2, 3])]
hvd.init(process_sets=sets)
mine = sets[0] if hvd.rank() == 0 else sets[1]
total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum, name="in.set", process_set=mine)
world = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum, name="in.world")
(folder / f"rank{hvd.rank()}").write_text(f"{total.item():g} {world.item():g}")
hvd.barrier()
""",
        HOROVOD_GLOO_TIMEOUT_SECONDS="8",
    )
    assert done.returncode == 0, done.stdout
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(4)] == ["1 10", "9 10", "9 10", "9 10"]


def test_stall_check_warns_under_gloo(tmp_path: Path) -> None:
    """The warning names the tensor that waits and the rank that is missing."""
    done = horovodrun(
        tmp_path,
        "localhost:2",
        """
hvd.init()
said = folder / "said"
if hvd.rank() == 0:
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
else:  # it comes when it is missed
    while not said.exists() or "Missing ranks:" not in said.read_text():
        time.sleep(0.05)
hvd.allreduce(torch.ones(1), op=hvd.Sum, name="late.tensor")
hvd.barrier()
""",
        HOROVOD_STALL_CHECK_TIME_SECONDS="1",
    )
    assert done.returncode == 0, done.stdout
    _, _, warning = (tmp_path / "said").read_text().partition("Missing ranks:")
    assert "1: [" in warning and "late.tensor" in warning, warning


def test_survivors_can_still_save(tmp_path: Path) -> None:
    """With process sets, the death of a rank is an exception in the others and no SIGABRT."""
    done = horovodrun(
        tmp_path,
        "localhost:3",
        """
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # horovodrun sends it to the survivors
sets = [hvd.ProcessSet([0]), hvd.ProcessSet([1, 2])]
hvd.init(process_sets=sets)
mine = sets[0] if hvd.rank() == 0 else sets[1]
try:
    for step in range(1000):
        hvd.allreduce(torch.ones(1), op=hvd.Sum, name="in.set", process_set=mine)
        hvd.allreduce(torch.ones(1), op=hvd.Sum, name="in.world")
        if step == 20 and hvd.rank() == 2:
            os._exit(7)
except (HorovodInternalError, ValueError):  # the latter where the set is given up already, when it is asked for
    (folder / ("saved-by-" + os.environ["HOROVOD_RANK"])).write_text(str(step))
""",
        HOROVOD_GLOO_TIMEOUT_SECONDS="8",
    )
    assert done.returncode != 0, "horovodrun tells that a rank died"
    saved = sorted(file.name for file in tmp_path.glob("saved-by-*"))
    assert saved == ["saved-by-0", "saved-by-1"], done.stdout


def test_a_rank_with_nothing_under_way_rests(tmp_path: Path) -> None:
    """It looks up for what is enqueued, or when all end, and hardly ever else; and what others do with one another
    does not wait for as long as it rests at most, which is beyond the job's time."""
    body = """
first, others = hvd.ProcessSet([0]), hvd.ProcessSet([1, 2])
hvd.init(process_sets=[first, others])
hvd.allreduce_(torch.ones(1), name="start")
time.sleep(1)
for i in range(5):
    hvd.allreduce_(torch.ones(1), name="sum")
    hvd.broadcast_(torch.ones(1), 0, name="back")
    hvd.allgather(torch.ones(1), name="gather")
if hvd.rank() == 0:
    while not all((folder / f"apart{rank}").exists() for rank in (1, 2)):
        time.sleep(0.05)
else:
    for i in range(5):
        hvd.allreduce_(torch.ones(1), name="apart", process_set=others)
        time.sleep(0.05)
    (folder / f"apart{hvd.rank()}").touch()
hvd.shutdown()
"""
    env = {"HOROVOD_TIMELINE": str(tmp_path / "timeline"), "HOROVOD_TIMELINE_MARK_CYCLES": "1",
           "HOROVOD_IDLE_CYCLE_TIME": "600000"}
    done = horovodrun(tmp_path, "localhost:3", body, **env)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "apart1").exists() and (tmp_path / "apart2").exists()
    looks = (tmp_path / "timeline").read_text().count("CYCLE_START")
    assert 10 <= looks < 500, "a look every millisecond makes more than a thousand"


@pytest.mark.parametrize("chosen", [["--gloo"], []], ids=["Gloo", "nothing said"])
def test_horovodrun_does_not_import_torch(tmp_path: Path, chosen: list[str]) -> None:
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError")
    program = Path(sys.executable).parent / "horovodrun"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([program, *chosen, "-np", "1", "touch", tmp_path / "ran"], env=env, check=True, timeout=60)
    assert (tmp_path / "ran").exists() and not (tmp_path / "imported").exists()
