"""``python -m smalti`` is the command ``smalti``."""

from smalti.cli.main import run

if __name__ == "__main__":
    run()
