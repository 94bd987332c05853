"""Backends: the libraries that run segments. Same names in every module; see `base`."""
