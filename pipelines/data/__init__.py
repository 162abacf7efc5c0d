"""A source (a Hub id, a file, a folder, a package) enters; checked splits without duplicates leave."""
