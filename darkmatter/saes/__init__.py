"""Sparse autoencoders: open, train, pack and export them; their sparse codes on disk."""
