"""The program of `make demo-real`, benchmarks/real.py, on a tiny random model."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hf_models import chat_model, make

from braeburn.errors import UserError
from support import braeburn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
real: Any = importlib.import_module("real")

ARTICLE = "".join(f"the cat sat on {number} mats , and the dog did not .\n" for number in range(20))
SIZES = ("--ffn", "64", "--sequence-length", "64", "--calibration-tokens", "1024")
TOKENS = ("--distilled-tokens", "4096", "--rounded-tokens", "4096", "--evaluation-bytes", "1500")


class Demo:
    """Calls of the program. Commands run in this process, and their names are kept.

    Attributes:
        folder: where the program writes.
        commands: that have run, in order.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "out"
        self.commands: list[str] = []
        self._patch = patch
        chat_model(folder / "hf", None, make(qk_norm=False), bos_token="<|im_start|>")
        text = "".join(f" \n = Title {number} = \n \n {ARTICLE}" for number in range(4))
        (folder / "text.txt").write_text(text)
        self._files = ["--model", str(folder / "hf"), "--data", str(folder / "text.txt")]
        patch.setattr(real, "braeburn", self._command)

    def __call__(self, *options: str) -> int:
        """Runs the program; returns its exit code."""
        words = ["real.py", "--out", str(self.folder), *self._files, *SIZES, *TOKENS, *options]
        self._patch.setattr(sys, "argv", words)
        return real.main()

    def _command(self, *arguments: object, **environment: str) -> dict[str, Any]:
        self.commands.append(str(arguments[0]))
        for name, value in environment.items():
            self._patch.setenv(name, value)
        answer = braeburn(*arguments, "--json")
        if answer.code:
            raise UserError(answer.err)
        return json.loads(answer.out)
