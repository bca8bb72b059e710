"""Scores of a model on a split, of whole source images or tile by tile, and its speed."""

from drd_hf.evaluation.augmentation import AUGMENTATIONS, AugmentedModel
from drd_hf.evaluation.protocols import PROTOCOLS, Protocol, find_protocol, references_of
from drd_hf.evaluation.sources import JoinedSource, join_tiles, joined_sources
from drd_hf.evaluation.tiles import (
    EVALUATION_PROTOCOL,
    check_labels,
    evaluate_model,
    finite_json,
    milliseconds_per_tile,
    protocol_of,
    same_labels,
    usable_device,
)
from drd_hf.evaluation.whole import EvaluatedSource, SourceEvaluation, evaluate_sources

__all__ = [
    "AUGMENTATIONS",
    "EVALUATION_PROTOCOL",
    "PROTOCOLS",
    "AugmentedModel",
    "EvaluatedSource",
    "JoinedSource",
    "Protocol",
    "SourceEvaluation",
    "check_labels",
    "evaluate_model",
    "evaluate_sources",
    "find_protocol",
    "finite_json",
    "join_tiles",
    "joined_sources",
    "milliseconds_per_tile",
    "protocol_of",
    "references_of",
    "same_labels",
    "usable_device",
]
