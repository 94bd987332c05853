"""The commands of the exporter: convert, train, export and pack."""
