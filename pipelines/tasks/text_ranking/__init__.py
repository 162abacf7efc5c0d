"""A query and a passage, and a score: how well the one answers the other (a cross-encoder, or reranker)."""
