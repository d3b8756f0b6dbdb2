"""`python -m braeburn` is the command `braeburn`."""

from braeburn.cli import console

if __name__ == "__main__":
    console()
