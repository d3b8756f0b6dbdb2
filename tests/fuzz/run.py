"""Thousands of damaged inputs for everything that Braeburn reads: `make fuzz`, or `python
tests/fuzz/run.py --help`.

Each input is a sound sample of which one file was changed at random; it is read in a process of its
own. Reading may succeed, or end in the one sentence of a `UserError`. Anything else is a fault:
another exception, the end of the process, more than 20 seconds, more than 4 GB, or a file written
outside the input's own folder. Faulty inputs are described, and kept in the folder that `--keep`
names. The same `--seed` makes the same inputs.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from braeburn.errors import UserError
from fuzz.mutations import mutate
from fuzz.targets import TARGETS, Target

SECONDS, GIGABYTES = 20.0, 4.0
READ, REFUSED, RAISED, WROTE_OUTSIDE = 0, 10, 11, 12
VERDICTS = {READ: "read", REFUSED: "refused"}


def watch(folder: Path, report: Path) -> None:
    """Ends this process when it opens a file for writing, or makes or removes one, outside of a
    folder.
    """
    allowed = (str(folder), str(report), "/dev/", "/proc/")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return not os.path.abspath(os.fsdecode(path)).startswith(allowed)  # noqa: PTH100

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & writing
        changed = event in (
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
        )
        # Names relative to an open folder, as shutil.rmtree has them, are below one that was
        # checked before.
        relative = (
            changed
            and isinstance(arguments[-1], int)
            and arguments[-1] >= 0
            and event != "os.mkdir"
        )
        if (opened or (changed and not relative)) and outside(arguments[0]):
            report.write_text(f"{event} {arguments}")
            os._exit(WROTE_OUTSIDE)

    sys.addaudithook(hook)


def child(target: Target, folder: Path, report: Path) -> None:
    """Reads an input, and ends this process with what came of it."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = os.environ["TMPDIR"] = str(folder.parent)
    tempfile.tempdir = str(folder.parent)
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    watch(folder.parent, report)
    try:
        target.read(folder)
        os._exit(READ)
    except UserError:
        os._exit(REFUSED)
    except BaseException:
        report.write_text(traceback.format_exc())
        os._exit(RAISED)


def verdict(target: Target, folder: Path, report: Path) -> str:
    """What came of reading an input: "read", "refused", or what is wrong."""
    process = os.fork()
    if process == 0:
        child(target, folder, report)
    deadline = time.monotonic() + SECONDS
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return f"hangs for {SECONDS:.0f} s"
        time.sleep(0.005)
    if usage.ru_maxrss > GIGABYTES * 2**20:
        return f"takes {usage.ru_maxrss / 2**20:.1f} GB"
    code = os.waitstatus_to_exitcode(status)
    if code in VERDICTS:
        return VERDICTS[code]
    told = report.read_text() if report.exists() else ""
    return (
        f"ends with {code}: {told.strip()[-1500:]}"
        if code != RAISED
        else f"raises: {told.strip()[-1500:]}"
    )


def fuzz(
    samples: Path, seed: int, numbers: range, until: float, keep: Path | None
) -> tuple[Counter[str], int]:
    """Makes and reads inputs; prints faults, and returns how many of each verdict and how many
    faults there were.
    """
    counts: Counter[str] = Counter()
    faults = 0
    weights = [target.weight for target in TARGETS]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for number in numbers:
            if time.monotonic() > until:
                break
            rng = random.Random(f"{seed}-{number}")
            (target,) = rng.choices(TARGETS, weights)
            place = Path(scratch) / str(number)
            folder = place / "input"
            shutil.copytree(samples / target.name, folder, symlinks=True)
            files = sorted(
                {path for glob in target.files for path in folder.glob(glob) if path.is_file()}
            )
            done = mutate(rng, rng.choice(files))
            found = verdict(target, folder, place / "report.txt")
            counts[f"{target.name}: {found if found in VERDICTS.values() else 'fault'}"] += 1
            if found not in VERDICTS.values():
                faults += 1
                print(f"input {number} ({target.name}; {done}) {found}\n", flush=True)
                if keep:
                    shutil.copytree(
                        folder, keep / f"{seed}-{number}", symlinks=True, dirs_exist_ok=True
                    )
            shutil.rmtree(place, ignore_errors=True)
    return counts, faults


def main() -> int:
    """Runs several processes like this one, each with its share of the inputs; returns the exit
    code.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=6000, help="how many")
    parser.add_argument(
        "--seconds", type=float, default=270, help="to stop after, whatever is left"
    )
    parser.add_argument(
        "--at-least", type=int, default=2000, help="inputs that must have been read by then"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that were faulty")
    parser.add_argument("--only", type=int, help="the number of the one input to read again")
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    if arguments.samples:
        numbers = range(arguments.share, arguments.inputs, arguments.processes)
        counts, faults = fuzz(arguments.samples, arguments.seed, numbers, until, arguments.keep)
        print("counts", json.dumps(counts))
        return 1 if faults else 0

    with tempfile.TemporaryDirectory(prefix="fuzz-samples-") as folder:
        # In a process of its own, since one in which JAX has run cannot be forked.
        making = [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from fuzz.targets import build; ",
        ]
        making[-1] += "build(Path(sys.argv[1]))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        subprocess.run([*making, folder], check=True, env=environment, stderr=subprocess.DEVNULL)
        if arguments.only is not None:
            one = range(arguments.only, arguments.only + 1)
            counts, faults = fuzz(Path(folder), arguments.seed, one, until, arguments.keep)
            print(dict(counts))
            return 1 if faults else 0
        left = until - time.monotonic()
        command = [sys.executable, *sys.argv, "--samples", folder, "--seconds", str(left)]
        shares = [
            subprocess.Popen([*command, "--share", str(share)], stdout=subprocess.PIPE, text=True)
            for share in range(arguments.processes)
        ]
        total: Counter[str] = Counter()
        for process in shares:
            out, _ = process.communicate()
            for line in out.splitlines():
                if line.startswith("counts "):
                    total += Counter(json.loads(line.removeprefix("counts ")))
                else:
                    print(line)
    for name, count in sorted(total.items()):
        print(f"{count:6} {name}")
    inputs, faults = (
        total.total(),
        sum(count for name, count in total.items() if name.endswith("fault")),
    )
    print(f"{inputs - faults} passed, {faults} failed")
    if inputs < arguments.at_least:
        print(f"error: only {inputs} inputs were read in time; {arguments.at_least} are wanted")
    broken = any(process.returncode not in (0, 1) for process in shares)
    return 1 if faults or broken or inputs < arguments.at_least else 0


if __name__ == "__main__":
    sys.exit(main())
