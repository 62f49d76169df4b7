"""Text: contexts of exactly n tokens, each with the id of its source document."""
