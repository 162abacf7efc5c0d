"""A label for every word of a text: named entities, personal data, parts of speech."""
