"""Darkmatter: what is the error of a sparse autoencoder made of?"""

__version__ = "0.1.0"
