"""Models: open one, read its sites, stop early; the kept activations on disk."""
