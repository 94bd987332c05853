"""Engines folders with fewer exits."""
