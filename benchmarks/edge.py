"""Install size and start-up of a bundle's environment beside torch and transformers, measured in one run.

    python benchmarks/edge.py --bundle runs/bert_bbc_news/bundle --model runs/bert_bbc_news/pruned --text "Shares fell"

Makes two virtual environments: one with the bundle's requirements.txt, one with torch and transformers. In turn, in fresh processes, each
predicts for one text: `infer.py` from the bundle, and transformers' pipeline from the model directory it was made from. Prints JSON: the bytes of
the installed packages, and the medians of the seconds from the start of the process to its end, and of importing alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).parents[1]
TRANSFORMERS = """
import sys
from transformers import pipeline
print(pipeline("text-classification", model=sys.argv[1], device="cpu")(sys.argv[2]))
"""


def make_environment(directory: Path, *requirements: str) -> Path:
    """A virtual environment of these packages, without pip itself, unless it is there; returns its python."""
    python = directory / "bin" / "python"
    if directory.exists():
        return python
    venv.create(directory, with_pip=True)
    constraints = ["-c", str(HERE / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, *requirements], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", "pip"], check=True)
    return python


def installed_bytes(python: Path) -> int:
    packages = next(python.parents[1].glob("lib/python*/site-packages"))
    return sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="the bundle of a text classifier")
    parser.add_argument("--model", required=True, type=Path, help="the model directory that transformers opens")
    parser.add_argument("--text", default="Shares fell", help="the text that both predict for")
    parser.add_argument("--rounds", type=int, default=9, help="processes of each kind, in turn")
    parser.add_argument("--environments", type=Path, help="where the environments are made, and found the next time")
    flags = parser.parse_args()

    scratch = flags.environments or Path(tempfile.mkdtemp())
    try:
        small = make_environment(scratch / "bundle", "-r", str(flags.bundle / "requirements.txt"))
        large = make_environment(scratch / "transformers", "torch", "transformers")
        predict = [str(small), str(flags.bundle / "infer.py"), flags.text]
        commands = {
            "bundle": predict,
            "bundle_imports": [str(small), "-c", "import numpy, onnxruntime, tokenizers"],
            "transformers": [str(large), "-c", TRANSFORMERS, str(flags.model), flags.text],
            "transformers_imports": [str(large), "-c", "import torch, transformers; transformers.pipeline"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for round_ in range(flags.rounds + 1):
            for name, command in commands.items():
                taken = seconds(command)
                if round_:  # the first round reads the files from disk
                    times[name].append(taken)
        medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
        measured = {
            name: {
                "installed_bytes": installed_bytes(python),
                "seconds": medians[name],
                "import_seconds": medians[f"{name}_imports"],
                "beyond_imports_seconds": round(medians[name] - medians[f"{name}_imports"], 3),
            }
            for name, python in (("bundle", small), ("transformers", large))
        }
        print(json.dumps(measured, indent=2))
    finally:
        if flags.environments is None:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
