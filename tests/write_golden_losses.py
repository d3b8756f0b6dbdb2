"""Writes `golden/losses.json` anew, and says by how much losses changed: `python
tests/write_golden_losses.py`.

To be run on purpose alone, when numbers are meant to change, or where exact equality is to hold
from then on: the file guards refactors, which keep the numbers. Everything is compiled at XLA's
default optimisation level, as users compile.
"""

import json
import os


def main() -> None:
    """Writes the file, and prints what changed."""
    # Before JAX is imported, as tests have it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ.pop("XLA_FLAGS", None)
    from golden_losses import FILE, cases, losses, machine

    before = json.loads(FILE.read_text())["losses"] if FILE.exists() else {}
    after = {}
    for name, run in cases().items():
        after[name] = losses(run)
        old = before.get(name, after[name])
        change = max(abs(a - b) / b for a, b in zip(after[name], old, strict=True))
        print(
            f"{name}: {after[name][0]:.4f} to {after[name][-1]:.4f}, largest change {change:.1e}",
            flush=True,
        )
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps({"machine": machine(), "losses": after}, indent=1) + "\n")


if __name__ == "__main__":
    main()
