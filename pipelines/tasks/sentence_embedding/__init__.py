"""Sentence embeddings: texts become vectors whose cosines say how alike they are."""
