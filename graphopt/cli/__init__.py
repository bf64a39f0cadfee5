"""The command line. Each verb lives in a file of its own and is imported only when it is called."""

from graphopt.cli.app import main

__all__ = ["main"]
