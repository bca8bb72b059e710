"""Model cards from the facts of a run: a section without facts disappears, and nothing is invented."""

from drd_hf.cards.facts import (
    CARD_HASH_KEY,
    CARD_KEY,
    COMPARISON_NAME,
    CONFUSION_NAME,
    CURVES_NAME,
    ORIGINS_KEY,
    RUN_NAME,
    TRAINED_NAME,
    Example,
    MeasuredResult,
    ModelCardFacts,
    Profile,
    facts_from_json,
    facts_to_json,
    hub_id,
    read_facts,
    read_run,
)
from drd_hf.cards.render import render_model_card, write_model_card

__all__ = [
    "CARD_HASH_KEY",
    "CARD_KEY",
    "COMPARISON_NAME",
    "CONFUSION_NAME",
    "CURVES_NAME",
    "ORIGINS_KEY",
    "RUN_NAME",
    "TRAINED_NAME",
    "Example",
    "MeasuredResult",
    "ModelCardFacts",
    "Profile",
    "facts_from_json",
    "facts_to_json",
    "hub_id",
    "read_facts",
    "read_run",
    "render_model_card",
    "write_model_card",
]
