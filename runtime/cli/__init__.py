"""The commands `fpabee-run` and `fpabee-inspect`, and what all commands share."""
