"""Backends: the libraries that run segments. What each of them implements is in `base`."""
