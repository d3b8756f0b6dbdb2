"""The printed script on a real SLURM of one controller and one node, on this machine: `make
test-slurm`.

Needs Debian's packages slurm-wlm and munge, and root. No systemd: the daemons are started here and
ended again.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from together import ENVIRON, STEPS

from support import contents, events, process, rows

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def call(*command: object, **options: object) -> str:
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ,
        **options,
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A folder of a running cluster's files."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged wants a socket that others can reach
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=free_ports(2)))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    # The job finds `braeburn` where these tests run.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ.update(JAX_NUM_CPU_DEVICES=ENVIRON["JAX_NUM_CPU_DEVICES"])
    files = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    daemons = [
        [
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={files['socket']}",
            f"--pid-file={files['pid']}",
            f"--log-file={files['log']}",
            f"--seed-file={files['seed']}",
        ],
        ["slurmctld"],
        ["slurmd"],
    ]
    try:
        for daemon in daemons:
            call(*daemon)
        deadline = time.monotonic() + 60
        while "idle" not in call("sinfo", "--noheader", "--format=%T"):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        for name in ("slurmd.pid", "slurmctld.pid", "munge.pid"):
            if (folder / name).exists():
                os.kill(int((folder / name).read_text()), signal.SIGTERM)
        time.sleep(2)  # they write as they end
        shutil.rmtree(folder, ignore_errors=True)


def submit(folder: Path, arguments: list[str], *more: str) -> tuple[str, Path, Path]:
    """Submits a printed script of two tasks; the job's number, its run directory and its log."""
    out = folder / "run"
    number = submit_to(folder, "--out", out, *arguments, *more)
    return number, out, folder / f"braeburn-afm-tiny-{number}.log"


def submit_to(folder: Path, *arguments: object) -> str:
    """Submits a printed script of two tasks that works in a new folder; the job's number."""
    folder.mkdir()
    printed = process("launch", "slurm", "--on", "cpu:2", "--json", *arguments)
    assert printed.code == 0, printed.err
    script = json.loads(printed.out)["script"]
    return call("sbatch", "--parsable", "--chdir", folder, input=script).strip()


def state(number: str) -> str:
    return re.search(r"JobState=(\w+)", call("scontrol", "show", "job", number))[1]


def wait_for(number: str, *states: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while state(number) not in states:
        assert time.monotonic() < deadline, call("scontrol", "show", "job", number)
        time.sleep(0.5)


def wait_for_row(out: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while (
        not (out / "metrics.jsonl").exists()
        or len((out / "metrics.jsonl").read_text().splitlines()) < count
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in rows(directory)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert process("train", *arguments, "--out", out, env=ENVIRON).code == 0
    return out


def test_two_tasks_train_to_the_end(
    cluster: Path, alone: Path, arguments: list[str], tmp_path: Path
) -> None:
    number, out, log = submit(tmp_path / "job", arguments)
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    assert state(number) == "COMPLETED", log.read_text()
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    assert events(out, "start")[0]["processes"] == 2
    assert log.read_text().count(f"finished at step {STEPS} of {STEPS}") == 1


def test_before_the_time_limit_the_run_is_saved_and_queued_again(
    cluster: Path, alone: Path, arguments: list[str], tmp_path: Path
) -> None:
    number, out, log = submit(tmp_path / "job", arguments, "--set", "checkpoint.every_steps=1000")
    wait_for_row(out, 3)
    call("scancel", "--signal=TERM", "--batch", number)  # what --signal=B:TERM@120 does in time
    wait_for(number, "PENDING")
    [stopped] = events(out, "preemption")
    assert 3 <= stopped["step"] < STEPS
    call(
        "scontrol", "update", f"JobId={number}", "StartTime=now"
    )  # a job queued again waits for two minutes
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    assert state(number) == "COMPLETED", log.read_text()
    assert events(out, "resume")[0]["step"] == stopped["step"]
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    assert "queued again" in log.read_text()


def test_a_killed_task_is_restarted_and_a_mistake_is_not(
    cluster: Path, alone: Path, arguments: list[str], tmp_path: Path
) -> None:
    number, out, log = submit(tmp_path / "job", arguments)
    wait_for_row(out, 8)
    [task, *_] = [
        entry.name
        for entry in Path("/proc").glob("[0-9]*")
        if (words := (entry / "cmdline").read_bytes().split(b"\0"))
        and str(out).encode() in words
        and b"SLURM_PROCID=1" in (entry / "environ").read_bytes().split(b"\0")
    ]
    os.kill(int(task), 9)
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    assert state(number) == "COMPLETED", log.read_text()
    assert "restart 1 of at most 3, from the last checkpoint" in log.read_text()
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)

    number, _, log = submit(
        tmp_path / "mistake", arguments, "--set", 'data.sources.code.paths=["/nowhere"]'
    )
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    assert state(number) == "FAILED"
    assert (
        "restart" not in log.read_text() and "no Python file matches '/nowhere'" in log.read_text()
    )


def test_a_cancelled_job_is_not_queued_again(
    cluster: Path, arguments: list[str], tmp_path: Path
) -> None:
    number, out, _ = submit(tmp_path / "job", arguments)
    wait_for_row(out, 1)
    call("scancel", number)
    wait_for(number, "CANCELLED", seconds=60)
    time.sleep(15)
    assert state(number) == "CANCELLED"


def test_two_tasks_evaluate_and_the_result_has_a_file_of_its_own(
    cluster: Path, alone: Path, tmp_path: Path
) -> None:
    words = ["evaluate", alone, "--json"]
    expected = json.loads(process(*words, env=ENVIRON).out)["results"]
    number = submit_to(tmp_path / "job", "--", *words, "--mesh", "fsdp=-1")
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    log = (tmp_path / "job" / f"braeburn-evaluate-run-{number}.log").read_text()
    assert state(number) == "COMPLETED", log
    result = tmp_path / "job" / f"braeburn-evaluate-run-{number}.out"
    found = json.loads(result.read_text())["results"]
    for source, values in expected.items():
        assert found[source]["loss"] == pytest.approx(values["loss"], rel=1e-5)
    assert f"the result will be in {result.name}" in log and "restart" not in log

    number = submit_to(tmp_path / "mistake", "--", "evaluate", tmp_path, "--mesh", "fsdp=-1")
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    log = (tmp_path / "mistake").joinpath(f"braeburn-evaluate-{tmp_path.name}-{number}.log")
    assert state(number) == "FAILED"
    assert "restart" not in log.read_text() and "is not a run directory" in log.read_text()


def test_two_tasks_export_what_one_does(cluster: Path, alone: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert process("export", alone, "--out", one, env=ENVIRON).code == 0
    number = submit_to(tmp_path / "job", "--", "export", alone, "--out", two)
    wait_for(number, "COMPLETED", "FAILED", "CANCELLED")
    assert state(number) == "COMPLETED"
    assert contents(two).keys() == contents(one).keys()
    result = tmp_path / "job" / f"braeburn-export-run-{number}.out"
    assert result.read_text().startswith("exported step ")


@pytest.mark.parametrize(
    ("how", "end"), [(("--signal=TERM", "--batch"), "FAILED"), ((), "CANCELLED")]
)
def test_a_command_that_is_stopped_is_not_begun_again(
    how: tuple[str, ...], end: str, cluster: Path, alone: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f(x):\n" * 2000)
    words = ["generate", alone, "--prompts", prompts, "--mesh", "fsdp=-1", "--batch", 2]
    number = submit_to(tmp_path / "job", "--", *words)
    result = tmp_path / "job" / f"braeburn-generate-run-{number}.out"
    deadline = time.monotonic() + 60
    while not result.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(8)  # it is at work by then
    call("scancel", *how, number)
    wait_for(number, end, seconds=60)
    log = result.with_suffix(".log").read_text()
    assert "restart" not in log and ("ended by SIGTERM before" in log or end == "CANCELLED")


def test_submit_hands_the_script_over(
    cluster: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = process(
        "launch", "slurm", *arguments, "--on", "cpu:2", "--out", tmp_path / "run", "--submit"
    )
    assert answer.code == 0, answer.err
    number = re.fullmatch(r"Submitted batch job (\d+)\n", answer.out)[1]
    call("scancel", number)
    answer = process(
        "launch",
        "slurm",
        *arguments,
        "--on",
        "cpu:2",
        "--out",
        tmp_path / "run",
        "--submit",
        "--partition",
        "none",
    )
    assert "sbatch refused the job (" in answer.error and "invalid partition" in answer.error
