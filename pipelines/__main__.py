"""`python -m pipelines` is the command `pocketformers`."""

from pipelines.cli import run

if __name__ == "__main__":
    run()
