"""The commands `fpabee-run`, `fpabee-serve` and `fpabee-inspect`, and what all commands share."""
