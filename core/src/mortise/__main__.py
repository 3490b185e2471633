"""The program ``mortise``, also run as ``python -m mortise``."""

from __future__ import annotations

from mortise.cli import command_tree


def main() -> None:
    """Run the command line and leave with its exit code."""
    command_tree().main(prog_name="mortise")


if __name__ == "__main__":
    main()
