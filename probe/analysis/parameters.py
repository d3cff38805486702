"""Parameters that several analyses share."""

from __future__ import annotations

from moescope.probe.analysis.frame import Parameter

UNIT = Parameter(
    name="unit",
    type="text",
    default="pair_id",
    help="prompt field that joins prompts into units of resampling; else each prompt is one",
)
SEED = Parameter(name="seed", type="integer", default=0, help="of everything drawn at random")
