"""Film reviews of a sentence as four tables: few labels, a held-out test split, and the rest without labels.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python benchmarks/film_reviews.py vaderSentiment-3.3.2.tar.gz --output_dir data/film_reviews

The sentences are Pang and Lee's (2005), the scores those of Hutto and Gilbert (2014), whose research package the source distribution of
vaderSentiment holds: each is the mean of 20 people's, -4 to 4. A review is positive where its score is above 0; those of exactly 0 are
left out. Please cite both papers with any result.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

ARCHIVE, TABLE = "hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SIZES = {"train": 3600, "validation": 400, "test": 2000}  # what remains has no label


def read_reviews(path: Path) -> pd.DataFrame:
    """The different reviews of a source distribution: columns text and label."""
    with tarfile.open(path) as outer:
        member = next(one for one in outer.getmembers() if one.name.endswith(ARCHIVE))
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            file = inner.extractfile(TABLE)
            assert file is not None
            rows = [line.split("\t") for line in file.read().decode("utf-8", "replace").splitlines()]
    reviews = pd.DataFrame(rows, columns=["number", "score", "text"]).astype({"score": float})
    reviews = reviews[reviews["score"] != 0].drop_duplicates("text")
    return pd.DataFrame(
        {"text": reviews["text"], "label": np.where(reviews["score"] > 0, "positive", "negative")}
    ).reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    flags = parser.parse_args()
    reviews = read_reviews(flags.source).sample(frac=1, random_state=0)
    (flags.output_dir / "labelled").mkdir(parents=True, exist_ok=True)
    start = 0
    for name, size in SIZES.items():
        reviews[start : start + size].to_csv(flags.output_dir / "labelled" / f"{name}.csv", index=False)
        start += size
    reviews[start:][["text"]].to_csv(flags.output_dir / "unlabelled.csv", index=False)
    print(f"{len(reviews):,} reviews: {SIZES}, {len(reviews) - start:,} without labels, in {flags.output_dir}")


if __name__ == "__main__":
    main()
