"""Which processes make up a run, and how they meet."""

import socket
import subprocess
import sys
import time

import jax
import pytest

from braeburn.cli.output import say
from braeburn.errors import UserError
from braeburn.parallel import processes
from braeburn.parallel.agreement import noticing_loss
from braeburn.parallel.processes import Membership, ProcessLost, find, on_one_machine
from support import process

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ((None, None, None), {}, None),
        ((None, 1, None), {}, None),
        (("h:1", 1, 0), {}, None),
        (("h:1", 4, 3), {}, Membership(3, 4, "h:1", "flags")),
        (
            (None, None, None),
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Membership(1, 2, "h:1", "flags"),
        ),
        ((None, None, None), SLURM, Membership(9, 16, None, "SLURM")),
        # The batch script itself, and a step of one task, are on their own.
        ((None, None, None), {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
        ((None, None, None), {**SLURM, "SLURM_NTASKS": "1"}, None),
        # Flags count for more: `launch local` within a SLURM job.
        (("127.0.0.1:5", 2, 1), SLURM, Membership(1, 2, "127.0.0.1:5", "flags")),
        (
            (None, None, None),
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"},
            Membership(3, 4, None, "Open MPI"),
        ),
        (("h:1", None, None), OPEN_MPI, Membership(3, 4, "h:1", "Open MPI")),
        ((None, None, None), GKE, Membership(1, 4, None, "GKE")),
        (
            (None, None, None),
            {**GKE, "MEGASCALE_NUM_SLICES": "8", "MEGASCALE_SLICE_ID": "2"},
            Membership(9, 32, None, "GKE"),
        ),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_who_is_there(flags: tuple, environ: dict[str, str], expected: Membership | None) -> None:
    assert find(*flags, environ=environ) == expected


@pytest.mark.parametrize(
    ("coordinator", "known_by", "environ", "expected"),
    [
        ("127.0.0.1:5", "flags", {}, True),
        ("localhost:5", "flags", {}, True),
        ("[::1]:5", "flags", {}, True),
        ("10.0.0.1:5", "flags", {}, False),
        # A job of one node may still be given a coordinator elsewhere.
        ("10.0.0.1:5", "flags", {**SLURM, "SLURM_STEP_NUM_NODES": "1"}, False),
        (None, "SLURM", {**SLURM, "SLURM_STEP_NUM_NODES": "1"}, True),
        (None, "SLURM", {**SLURM, "SLURM_NNODES": "2"}, False),
        (None, "SLURM", {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2"}, True),
        (None, "Open MPI", {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, True),
        (None, "Open MPI", {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
        (None, "GKE", GKE, False),
    ],
)
def test_whether_all_are_on_one_machine(
    coordinator: str | None, known_by: str, environ: dict[str, str], expected: bool
) -> None:
    assert on_one_machine(Membership(1, 4, coordinator, known_by), environ) == expected


@pytest.mark.parametrize(
    ("flags", "environ", "sentence"),
    [
        (("h:1", None, None), {}, "--num-processes is missing; give"),
        (("h:1", 4, None), {}, "--process-id is missing; give each process its own, from 0 to 3"),
        ((None, 4, 0), {}, "--coordinator is missing; give HOST:PORT"),
        ((None, None, 0), {}, "--num-processes is missing"),
        (
            ("h:1", 4, 4),
            {},
            "--process-id 4 is not one of the 4 processes; give each its own, from 0 to 3",
        ),
        (("h:1", 4, -1), {}, "--process-id -1 is not one"),
        (("h:1", 0, 0), {}, "--num-processes 0 is less than 1"),
        (("h", 4, 0), {}, "--coordinator 'h' has no port; write HOST:PORT"),
        (
            (None, None, None),
            OPEN_MPI,
            "Open MPI 5 does not tell where process 0 runs; --coordinator is missing",
        ),
        (
            (None, None, None),
            {"JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES='two' is not a number",
        ),
    ],
)
def test_mistakes(flags: tuple, environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        find(*flags, environ=environ)
    assert sentence in str(error.value)


def test_a_mistake_in_the_flags_is_told_before_jax_is_imported(tmp_path: object) -> None:
    program = (
        "import sys\nfrom braeburn.cli import main\ntry:\n    main()\n"
        "finally:\n    assert 'jax' not in sys.modules, 'JAX was imported'"
    )
    arguments = [
        "train",
        "afm-tiny",
        "--out",
        f"{tmp_path}/out",
        "--coordinator",
        "h:1",
        "--num-processes",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --process-id is missing; give each process its own, from 0 to 1\n"


MEET = """
import sys, time
from braeburn.parallel import processes
address, number, seconds = sys.argv[1:]
joined = processes.connect(address, 2, int(number), join_seconds=float(seconds))
print(joined.process_id, processes.is_main(), flush=True)
import jax, os
os.write(1, b"noise\\n")
print(jax.process_index(), jax.process_count())
processes.leave(int(number))
"""


def meet(numbers: list[int], seconds: float) -> list[tuple[int, str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, address, str(number), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]
    outputs = [process.communicate(timeout=60) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_processes_meet_and_leave_without_waiting_for_each_other() -> None:
    first, second = meet([0, 1], 60)
    assert (first[0], first[1]) == (0, "0 True\n0 2\n")
    assert (second[0], second[1]) == (1, "1 False\n1 2\n")
    assert "noise" in first[2]  # what libraries print does not get among the results


@pytest.mark.parametrize("number", [0, 1])
def test_who_waits_in_vain_says_so(number: int) -> None:
    began = time.monotonic()
    [(code, out, err)] = meet([number], 3)
    assert (code, out) == (1, "")
    who = "" if number == 0 else "[process 1] "
    assert err.startswith(f"{who}error: the 2 processes of the run did not all meet at 127.0.0.1:")
    assert "within 3 s; check that each was started" in err and err.count("\n") == 1
    assert time.monotonic() - began < 40


def test_an_error_names_its_process(tmp_path: object) -> None:
    """Of a process that has not met the others the number is not known yet, so it is plain."""
    answer = process(
        "train", "afm-tiny", "--out", f"{tmp_path}/out", "--set", "seed=x", "--num-processes", 2
    )
    assert answer.error.startswith("error: seed='x'")


def test_what_follows_the_end_of_another_process_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Collectives fail where a peer was killed; their trace of a hundred lines says nothing that
    its own does not.
    """
    closed = jax.errors.JaxRuntimeError(
        "INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1"
    )
    for number, expected in ((2, ProcessLost), (1, jax.errors.JaxRuntimeError)):
        monkeypatch.setattr(jax, "process_count", lambda number=number: number)
        with pytest.raises(expected), noticing_loss():
            raise closed
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for error in (
        ValueError("Gloo"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ):
        with pytest.raises(type(error)) as raised, noticing_loss():
            raise error
        assert raised.value is error


@pytest.mark.parametrize(("number", "told"), [(0, "once\n"), (1, "")])
def test_lines_for_the_user_come_from_one_process(
    number: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_joined", Membership(number, 2, None, "SLURM"))
    say("once")
    assert capsys.readouterr().err == told
