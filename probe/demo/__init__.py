"""The demo models: an invented world, the questions about it, and the training on them.

Everything the shipped models know is made here from a seed, so the truth about them is known:
what they were taught, what they were taught to refuse, and which experts learned the refusal.
"""
