"""The zoo: every family with routed experts in the installed transformers, as a tiny random model.

`families()` finds them; `tiny_model(family)` builds one with inputs for its forward, in a fraction
of a second and without any download.
"""

from moescope.probe.zoo.build import TinyModel, tiny_model
from moescope.probe.zoo.walk import Family, families

__all__ = ["Family", "TinyModel", "families", "tiny_model"]
