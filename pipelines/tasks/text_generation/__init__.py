"""Text whose every token is predicted from those before it: a causal language model."""
