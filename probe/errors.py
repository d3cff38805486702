"""Every error moescope raises on purpose.

    MoescopeError
    ├── InputError            what the user gave is wrong; the command line exits with 2
    │   ├── PromptFileError   a prompt file: names file, line and field
    │   ├── ModelInputError   a model that cannot be found, or has no routers
    │   ├── StoreError        a file that is not a store, or one of another version
    │   ├── RunError          a run that does not exist, exists already, or was begun otherwise
    │   ├── AnalysisInputError  an analysis asked for what the run cannot answer
    │   ├── ImportFileError   a file of another system that is not what it should be
    │   └── PlanError         a steering plan that is malformed or does not fit the model
    ├── RecordingError        routing that would have been recorded wrongly: stopped instead
    │   └── UnknownRoutingError  a part of a router's selection rule that cannot be read
    └── StoreBusyError        the store stayed locked by others for longer than we wait

One sentence each: what was wrong, where, and what would be right.
"""

from __future__ import annotations


class MoescopeError(Exception):
    """Anything moescope stops for on purpose; exit code 1 unless it is an InputError."""


class InputError(MoescopeError):
    """What the user gave is wrong; exit code 2."""


class PromptFileError(InputError):
    """A prompt file is missing or malformed; the message names file, line and field."""


class ModelInputError(InputError):
    """A model that cannot be found or loaded, or that has no routers."""


class StoreError(InputError):
    """A file that is not a moescope store, or one of another schema version."""


class RunError(InputError):
    """A run that does not exist, exists already, or was begun with other arguments."""


class AnalysisInputError(InputError):
    """An analysis was asked for something that the run cannot answer."""


class ImportFileError(InputError):
    """A file of another system that is malformed or says what cannot be; names file and place."""


class PlanError(InputError):
    """A steering plan that is malformed or does not fit the model."""


class RecordingError(MoescopeError):
    """Routing that would have been recorded wrongly; the message names the layer and the reason."""


class UnknownRoutingError(RecordingError):
    """A part of a router's selection rule cannot be read; the message names router and part."""


class StoreBusyError(MoescopeError):
    """The store stayed locked by other processes for longer than we wait."""
