"""One module a format; each has an `IMPORTER`."""
