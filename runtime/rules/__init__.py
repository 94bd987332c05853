"""The exit rules: which rows stop after each exit. Pure numpy, without input or output."""
