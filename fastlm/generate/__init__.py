"""Text from a model: greedy, sampled or by beam search, one token of work a step, for batches of prompts of any lengths.

A model takes part by three methods (`Generative`): ``prefill`` reads the prompts and returns a state, ``step`` appends a
token to each row of it, and the state's ``reorder`` moves rows. Decoder-only models, encoder-decoders and recurrent ones
differ in what their state holds.
"""

from __future__ import annotations

from .beam import Hypothesis, beam_search
from .choice import choose, constrain, probabilities
from .rows import Generative, State, unpadded
from .sampling import generate, stream
from .text import stream_text

__all__ = [
    "Generative",
    "Hypothesis",
    "State",
    "beam_search",
    "choose",
    "constrain",
    "generate",
    "probabilities",
    "stream",
    "stream_text",
    "unpadded",
]
