"""The runtime: run an engines folder."""
