"""The `dinocell` command: arguments and messages; the work is done by the rooms below."""

from dinocell.cli.app import main

__all__ = ["main"]
