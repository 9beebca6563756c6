"""Words of the demo reviews and what each is worth.

An *entry* is a word or phrase with a base value in [-1, 1] ("dull": -0.65). A *modifier* before it
scales the value ("very dull"), a *negator* before both turns it around and shrinks it ("not dull"
is weaker praise than "gripping"). A *frame* weighs a whole clause ("Although ..., ", "My sister
thinks ..."). `stars_fast.demo.grammar` writes with these tables, `stars_fast.demo.gold` reads with
them; the language model and the reward model see the text alone.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ASPECTS",
    "CONCESSION_WEIGHT",
    "CONTRAST_WEIGHT",
    "DEEDS",
    "ENTRIES",
    "EXPECTATION_WEIGHT",
    "FILMS",
    "MILD",
    "MODIFIERS",
    "NEGATORS",
    "NEUTRAL",
    "OPINIONS",
    "PLAIN",
    "PRODUCTS",
    "QUALITIES",
    "REPORT_WEIGHT",
    "STRONG",
    "VERDICT_WEIGHT",
]

MILD: Final = 0.35
PLAIN: Final = 0.65
STRONG: Final = 0.9

CONCESSION_WEIGHT: Final = 0.5  # "slow" in "slow at first, but gripping later"
CONTRAST_WEIGHT: Final = 1.5  # "gripping" in the same sentence
REPORT_WEIGHT: Final = 0.25  # somebody else's opinion: "My sister thinks ..."
EXPECTATION_WEIGHT: Final = 0.0  # what the writer expected says nothing about what came
VERDICT_WEIGHT: Final = 2.0  # "Overall, ..."

MODIFIERS: Final[dict[str, float]] = {
    "a little": 0.5,
    "slightly": 0.5,
    "somewhat": 0.6,
    "rather": 0.8,
    "quite": 0.8,
    "mostly": 0.8,
    "very": 1.3,
    "really": 1.3,
    "truly": 1.3,
    "extremely": 1.4,
}

# The value of a negated entry is -strength times the value; deeds are turned around in full.
NEGATORS: Final[dict[str, float]] = {
    "not": 0.5,
    "never": 0.6,
    "hardly": 0.6,
    "far from": 0.8,
    "anything but": 1.0,
    "without being": 0.4,
}

# Qualities that fit a family of aspects, by base value.
QUALITIES: Final[dict[str, dict[str, float]]] = {
    "general": {
        "good": PLAIN,
        "great": STRONG,
        "excellent": STRONG,
        "superb": STRONG,
        "decent": MILD,
        "fine": MILD,
        "pleasant": PLAIN,
        "better than I expected": PLAIN,
        "bad": -PLAIN,
        "poor": -PLAIN,
        "awful": -STRONG,
        "terrible": -STRONG,
        "horrible": -STRONG,
        "mediocre": -MILD,
        "forgettable": -MILD,
        "worse than I expected": -PLAIN,
    },
    "story": {
        "gripping": STRONG,
        "clever": PLAIN,
        "moving": PLAIN,
        "original": PLAIN,
        "funny": PLAIN,
        "exciting": PLAIN,
        "coherent": MILD,
        "dull": -PLAIN,
        "boring": -PLAIN,
        "predictable": -MILD,
        "confusing": -PLAIN,
        "silly": -MILD,
        "tedious": -STRONG,
        "pointless": -STRONG,
        "too long": -MILD,
    },
    "people": {
        "convincing": PLAIN,
        "charming": PLAIN,
        "brilliant": STRONG,
        "likable": MILD,
        "wooden": -PLAIN,
        "lifeless": -STRONG,
        "annoying": -PLAIN,
        "bland": -MILD,
    },
    "look": {
        "beautiful": STRONG,
        "elegant": PLAIN,
        "stylish": PLAIN,
        "tasteful": MILD,
        "ugly": -STRONG,
        "drab": -PLAIN,
        "tacky": -PLAIN,
        "dated": -MILD,
    },
    "sound": {
        "rich": PLAIN,
        "crisp": PLAIN,
        "haunting": STRONG,
        "catchy": MILD,
        "harsh": -PLAIN,
        "muffled": -PLAIN,
        "grating": -STRONG,
        "too loud": -MILD,
    },
    "build": {
        "sturdy": PLAIN,
        "solid": PLAIN,
        "flawless": STRONG,
        "durable": PLAIN,
        "light enough": MILD,
        "flimsy": -PLAIN,
        "fragile": -PLAIN,
        "shoddy": -STRONG,
        "wobbly": -PLAIN,
        "too heavy": -MILD,
    },
    "power": {
        "reliable": PLAIN,
        "powerful": PLAIN,
        "outstanding": STRONG,
        "efficient": MILD,
        "weak": -PLAIN,
        "unreliable": -PLAIN,
        "useless": -STRONG,
        "too hot": -MILD,
    },
    "use": {
        "simple": MILD,
        "intuitive": PLAIN,
        "handy": PLAIN,
        "comfortable": PLAIN,
        "clumsy": -PLAIN,
        "awkward": -MILD,
        "frustrating": -STRONG,
        "irritating": -PLAIN,
    },
    "service": {
        "prompt": MILD,
        "helpful": PLAIN,
        "friendly": PLAIN,
        "wonderful": STRONG,
        "rude": -STRONG,
        "careless": -PLAIN,
        "late": -MILD,
        "sloppy": -PLAIN,
    },
    "price": {
        "fair": PLAIN,
        "reasonable": MILD,
        "unbeatable": STRONG,
        "too high": -PLAIN,
        "outrageous": -STRONG,
        "steep": -MILD,
    },
}

# What reviews talk about, by family of qualities.
ASPECTS: Final[dict[str, tuple[str, ...]]] = {
    "story": (
        "plot",
        "story",
        "script",
        "dialogue",
        "ending",
        "opening scene",
        "second half",
        "final act",
        "humor",
        "pacing",
    ),
    "people": ("lead actor", "villain", "main character", "cast", "narrator", "young hero"),
    "film look": ("camera work", "lighting", "set design", "costume design", "color palette"),
    "film sound": ("soundtrack", "music", "sound mix", "theme song"),
    "build": ("build", "frame", "handle", "finish", "hinge", "stitching", "base", "lid"),
    "look": ("design", "shape", "color", "surface"),
    "sound": ("alarm", "speaker sound", "start tone"),
    "power": ("battery", "charger", "motor", "power supply", "switch"),
    "use": ("manual", "setup", "menu", "grip", "control panel", "cleaning"),
    "service": ("delivery", "support team", "packaging", "seller", "repair service"),
    "price": ("price", "price tag", "shipping fee"),
}

FILMS: Final = (
    "film",
    "war film",
    "crime drama",
    "space adventure",
    "romantic comedy",
    "documentary",
    "horror film",
    "spy thriller",
    "western",
    "family film",
)

# Families of aspects that fit each product.
_GADGET: Final = ("build", "look", "sound", "power", "use", "service", "price")
_APPLIANCE: Final = ("build", "look", "power", "use", "service", "price")
_GEAR: Final = ("build", "look", "use", "service", "price")
PRODUCTS: Final[dict[str, tuple[str, ...]]] = {
    "phone": _GADGET,
    "laptop": _GADGET,
    "camera": _GADGET,
    "watch": _GADGET,
    "radio": _GADGET,
    "headset": _GADGET,
    "kettle": _APPLIANCE,
    "blender": _APPLIANCE,
    "vacuum cleaner": _APPLIANCE,
    "coffee machine": _APPLIANCE,
    "desk lamp": _APPLIANCE,
    "backpack": _GEAR,
    "tent": _GEAR,
    "office chair": _GEAR,
    "suitcase": _GEAR,
    "bicycle": _GEAR,
}

# First-person verbs: past form, base form (after "did not"), base value.
OPINIONS: Final[tuple[tuple[str, str, float], ...]] = (
    ("loved", "love", STRONG),
    ("enjoyed", "enjoy", PLAIN),
    ("liked", "like", MILD),
    ("admired", "admire", PLAIN),
    ("disliked", "dislike", -PLAIN),
    ("hated", "hate", -STRONG),
    ("resented", "resent", -PLAIN),
)

# Ends of "I would ...": what the writer would do, by base value.
DEEDS: Final[dict[str, dict[str, float]]] = {
    "film": {
        "recommend it": STRONG,
        "watch it again": PLAIN,
        "buy a ticket for the sequel": PLAIN,
        "warn my friends": -STRONG,
        "skip the sequel": -PLAIN,
        "ask for a refund": -STRONG,
    },
    "product": {
        "recommend it": STRONG,
        "buy it again": PLAIN,
        "give it as a gift": PLAIN,
        "warn other buyers": -STRONG,
        "send it back": -PLAIN,
        "ask for a refund": -STRONG,
    },
}

# Sentences that say nothing about quality.
NEUTRAL: Final[dict[str, tuple[str, ...]]] = {
    "film": (
        "It runs for about two hours.",
        "The director has made two other films.",
        "Most of it is set in a small town.",
        "It is based on a novel.",
        "The story begins in winter.",
        "It was shown in the large hall.",
        "There are three main parts.",
        "It was made on a small budget.",
    ),
    "product": (
        "It came in a brown box.",
        "I have used it every day since then.",
        "It replaces an older model.",
        "There are three sizes to choose from.",
        "I ordered the gray version.",
        "It is made of steel and plastic.",
        "It stands next to my desk.",
        "The box also holds a spare part.",
    ),
}


def _entries() -> dict[str, tuple[float, bool]]:
    """Every phrase that carries sentiment, in lower case: (base value, is a deed)."""
    table: dict[str, tuple[float, bool]] = {}
    for qualities in QUALITIES.values():
        table.update({phrase.lower(): (value, False) for phrase, value in qualities.items()})
    for past, base, value in OPINIONS:
        table[past] = table[base] = (value, False)
    for deeds in DEEDS.values():
        table.update({phrase: (value, True) for phrase, value in deeds.items()})
    return table


ENTRIES: Final = _entries()
