"""The kernels that took longest in a profile of a GPU or CPU, as JAX's profiler wrote it.

    python benchmarks/kernels.py PROFILE [--top 10] [--json]

PROFILE is an .xplane.pb file, or a folder that holds one somewhere below it. Kernels of one name
but for the number at its end are one row.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

# What a kernel does, by parts of its name; the first that fits.
CLASSES = {
    "attention": ("sdpa", "flash", "fmha"),
    "products": ("nvjet", "gemm", "cutlass", "wgmma", "dot"),
    "copies": ("Memcpy", "Memset"),
}
REST = "the rest"


def class_of(kernel: str) -> str:
    """What a kernel of this name does."""
    return next(
        (name for name, parts in CLASSES.items() if any(part in kernel for part in parts)), REST
    )


def kernels(profile: Path) -> dict[str, Any]:
    """Seconds, calls and share of each kernel, the longest first, the share of each class, and the
    seconds from the first to the last.

    Of a program that ran on a CPU the kernels are its operations, by all threads together.
    """
    from jax.profiler import ProfileData

    seconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    classes: collections.Counter[str] = collections.Counter()
    begin, end = float("inf"), 0.0
    planes = list(ProfileData.from_file(str(profile)).planes)
    of_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU:0")]
    plane_name, line_name = ("/device:GPU:0", "Stream") if of_gpu else ("/host:CPU", "tf_XLA")
    for plane in planes:
        if not plane.name.startswith(plane_name):
            continue
        for line in plane.lines:
            if not line.name.startswith(line_name):
                continue
            for event in line.events:
                if not of_gpu and "::" in event.name:  # not an operation, but what runs several
                    continue
                name = re.sub(r"[_.]\d+$", "", event.name)
                seconds[name] += event.duration_ns / 1e9
                calls[name] += 1
                begin = min(begin, event.start_ns)
                end = max(end, event.start_ns + event.duration_ns)
                classes[class_of(name)] += event.duration_ns / 1e9
    total = sum(seconds.values())
    if not total:
        raise SystemExit(f"error: {profile} has no kernel; profile a run of some steps")
    return {
        "device": "GPU" if of_gpu else "CPU",
        "busy_seconds": total,
        "seconds": (end - begin) / 1e9,
        "kernels": [
            {"kernel": name, "seconds": time, "calls": calls[name], "share": time / total}
            for name, time in seconds.most_common()
        ],
        "classes": {name: time / total for name, time in classes.most_common()},
    }


def main() -> int:
    """Prints a table or JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("profile", type=Path, metavar="PROFILE")
    parser.add_argument("--top", type=int, default=10, help="rows to print")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    profile = arguments.profile
    if profile.is_dir():
        files = sorted(profile.rglob("*.xplane.pb"))
        if not files:
            print(f"error: {profile} holds no .xplane.pb file", file=sys.stderr)
            return 2
        profile = files[-1]
    found = kernels(profile)
    found["kernels"] = found["kernels"][: arguments.top]
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(f"{found['busy_seconds']:.3f} s of kernels within {found['seconds']:.3f} s")
    for row in found["kernels"]:
        print(f"{row['share']:6.1%} {row['calls']:6} {row['seconds'] * 1e3:9.2f} ms  ", end="")
        print(row["kernel"][:90])
    print(", ".join(f"{name} {share:.1%}" for name, share in found["classes"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
