"""The chain: segments and rules in turn (`chain`), and the groups of rows in it (`groups`)."""
