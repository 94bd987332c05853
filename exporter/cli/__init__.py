"""The commands of the exporter: convert, train, export, pack and bench."""
