"""The commands of the command line, grouped by what they are about.

Each module has `register(app)`; whatever is slow to import is imported inside the commands.
"""
