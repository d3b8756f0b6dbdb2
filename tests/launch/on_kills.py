"""Five times over, a random process of four is killed at a random time, and the run loses nothing:
`make test-kill`.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from together import ENVIRON, members

from support import PROGRAM, process, rows

KILLS = 5


def test_five_kills_at_random(arguments: list[str], tmp_path: Path) -> None:
    # Long enough for five lives; a checkpoint every 5 steps.
    command = [
        "launch",
        "local",
        *arguments,
        "--set",
        "stages.core.tokens=204800",
        "--processes",
        "4",
        "--json",
    ]
    undisturbed = process(*command, "--out", tmp_path / "undisturbed", env=ENVIRON)
    assert undisturbed.code == 0, undisturbed.err

    out = tmp_path / "killed"
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    choice = random.Random(seed)
    supervisor = subprocess.Popen(
        [*PROGRAM, *command, "--max-restarts", str(KILLS), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON,
    )  # fmt: skip
    before: set[int] = set()
    for _ in range(KILLS):
        while not (len(there := members(out)) == 4 and not before & set(there.values())):
            assert supervisor.poll() is None, supervisor.communicate()[1]
            time.sleep(0.05)
        before = set(there.values())
        # Two kills in five while the processes start and compile, the others among the steps.
        made = steps_made(out)
        if choice.random() < 0.4:
            time.sleep(choice.uniform(0.0, 10.0))
        else:
            while steps_made(out) <= made:
                time.sleep(0.02)
            time.sleep(choice.uniform(0.0, 3.0))
        number = choice.randrange(4)
        os.kill(there[number], signal.SIGKILL)
        print(f"killed process {number} after step {steps_made(out)}", flush=True)
    printed, log = supervisor.communicate(timeout=600)
    print(log)
    assert supervisor.returncode == 0
    assert members(out) == {}
    result = json.loads(printed)
    losses, expected = (
        [row["loss"] for row in rows(folder)] for folder in (out, tmp_path / "undisturbed")
    )
    assert losses == expected
    assert result["stages"] == json.loads(undisturbed.out)["stages"]
    assert len(result["restarts"]) == KILLS
    for restart in result["restarts"]:
        print(restart)
        assert restart["seconds"] is None or restart["seconds"] < 60


def steps_made(out: Path) -> int:
    """The last step in the metrics, of which a restart may take some back."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0
