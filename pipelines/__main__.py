"""`python -m pipelines` is the command `pocketformers`."""

from pipelines.cli import main
from pipelines.core.config import run_main

if __name__ == "__main__":
    run_main(main)
