"""The command line. Each command imports what it needs, so that `--help` answers at once."""

from braeburn.cli.command import app, console, main

__all__ = ["app", "console", "main"]
