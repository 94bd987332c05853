"""The engines folder: its manifest, its files, and the only code that reads and writes them."""
