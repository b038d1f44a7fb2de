"""The ``fasthyper`` command. Outside the package, so that it can say in one line why the package cannot be imported."""

import sys


def main() -> int:
    """Runs the command line; returns its exit status."""
    try:
        from fasthyper.cli import main as command
    except ImportError as error:
        print(f"fasthyper: {error}", file=sys.stderr)
        return 1
    return command()
