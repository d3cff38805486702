"""Train the demo models from a seed: `python -m moescope.probe.demo.train`, or `make train-demo`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moescope.probe.demo.corpus import Corpus, Item, Recipe, batch_items, tokenizer_texts
from moescope.probe.demo.routing import (
    RouterTraining,
    counted_usage,
    routing_rule,
    training_routers,
)
from moescope.probe.demo.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER, train_tokenizer

log = logging.getLogger(__name__)

