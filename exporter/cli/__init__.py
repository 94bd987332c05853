"""The commands `fpabee-export`, `fpabee-bench` and `fpabee-train`."""
