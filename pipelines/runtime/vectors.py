"""Vectors of texts, stored in fewer bytes, and searched by their cosine."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("float32", "int8", "binary")


def convert(vectors: Any, kind: str) -> Any:
    """Float vectors (…, size) as stored: themselves, a byte a number by each vector's own largest, or a bit a number: whether it is above 0.

    A cosine does not depend on the length of a vector, so that no scale has to be stored.
    """
    if kind == "int8":
        largest = np.abs(vectors).max(axis=-1, keepdims=True)
        return np.round(127 * vectors / np.maximum(largest, 1e-12)).astype(np.int8)
    return np.packbits(vectors > 0, axis=-1) if kind == "binary" else vectors


def unit(stored: Any) -> Any:
    """What convert() gave as float32 vectors of length 1, whose dot products are cosines; of bits these order as the Hamming distance."""
    if stored.dtype == np.uint8:
        stored = 2.0 * np.unpackbits(stored, axis=-1) - 1
    floats = stored.astype(np.float32)
    return floats / np.maximum(np.linalg.norm(floats, axis=-1, keepdims=True), 1e-12)


def search(queries: Any, corpus: Any, count: int = 10) -> tuple[Any, Any]:
    """For each stored query the places of the nearest stored vectors, the nearest first, and their cosines, both (queries, count)."""
    cosines = unit(queries) @ unit(corpus).T
    places = np.argsort(-cosines, axis=-1, kind="stable")[:, :count]
    return places, np.take_along_axis(cosines, places, axis=-1)
