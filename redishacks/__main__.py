"""`redishacks …` and `python -m redishacks …`: the command line, when its libraries are there."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without click or rich say what to install, and exit with 2."""
    try:
        from redishacks.cli import commands
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("click", "rich"):
            raise
        sys.exit(_missing(error.name))
    commands(prog_name="redishacks")


def _missing(name: str | None) -> int:
    print(
        f"redishacks: the command line needs {name}: pip install 'redishacks[cli]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main()
