"""Which things a text names: a small vocabulary of everyday objects, each with the words that mean it.

Object overlap as CHAIR measures it (Rohrbach et al. 2018, arXiv:1809.02156) needs such a list; theirs is made for COCO's 80 classes, this one is
our own, for photographs of people, animals, vehicles and household things. A thing outside of it is neither right nor wrong. Words are
looked up whole, in lower case, longest first, singular and regular plural; "hot dog" is therefore no dog.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

THINGS: dict[str, tuple[str, ...]] = {
    "person": (
        "man", "men", "woman", "women", "boy", "girl", "child", "children", "kid", "baby", "babies", "toddler", "lady", "ladies", "guy", "player",
        "people", "crowd", "adult", "teenager", "couple", "biker", "cyclist", "skier", "snowboarder", "skateboarder", "surfer", "runner", "climber",
        "hiker", "swimmer", "rider", "worker", "performer", "dancer", "singer", "musician", "fisherman", "friend", "family", "someone",
    ),
    "dog": ("puppy", "puppies", "terrier", "poodle", "greyhound", "labrador", "retriever", "collie", "hound", "bulldog", "dachshund"),
    "cat": ("kitten", "kitty"), "horse": ("pony", "ponies"), "cow": ("cattle", "bull", "calf"), "sheep": ("lamb",), "goat": (), "pig": (),
    "bird": ("duck", "goose", "geese", "seagull", "eagle", "parrot", "pigeon", "chicken", "flamingo"), "fish": (), "elephant": (), "bear": (), "deer": (),
    "rabbit": ("bunny",), "monkey": (), "tiger": (), "lion": (), "frog": (), "snake": (), "butterfly": ("butterflies",), "insect": ("bee", "beetle"),
    "ball": ("football", "baseball", "basketball", "soccer ball", "tennis ball", "volleyball"), "frisbee": (), "stick": (), "toy": (), "kite": (),
    "bicycle": ("bike", "mountain bike"), "motorcycle": ("motorbike", "dirt bike"), "car": ("automobile", "race car"), "truck": ("pickup",), "bus": ("buses",),
    "train": (), "boat": ("canoe", "kayak", "sailboat", "raft"), "ship": (), "airplane": ("plane", "aeroplane", "jet"), "helicopter": (), "tractor": (),
    "skateboard": (), "snowboard": (), "ski": (), "surfboard": (), "sled": (), "scooter": (), "swing": (), "slide": (), "rope": (), "bat": (), "guitar": (), "drum": (),
    "camera": (), "phone": ("cellphone", "telephone"), "computer": ("laptop",), "book": ("newspaper", "magazine"), "umbrella": (), "bag": ("backpack",), "bottle": (),
    "cup": ("mug",), "glass": ("glasses",), "bowl": (), "plate": (), "knife": ("knives",), "spoon": (), "chair": (), "bench": ("benches",), "table": (), "bed": (),
    "couch": ("sofa",), "television": ("tv",), "clock": (), "lamp": (), "tent": (), "hat": ("cap", "helmet"), "shirt": ("t-shirt", "jersey"), "jacket": ("coat",),
    "dress": ("dresses",), "building": ("house", "skyscraper", "castle", "church"), "bridge": (), "fence": (), "wall": (), "door": (), "window": (), "street": ("road", "sidewalk"),
    "tree": ("palm tree", "oak", "pine"), "flower": ("rose", "tulip", "sunflower"), "grass": ("lawn",), "rock": ("boulder", "cliff"), "mountain": ("hill",),
    "beach": ("beaches",), "water": ("ocean", "sea", "lake", "river", "pool", "wave"), "snow": (), "sand": (), "food": ("cake", "pizza", "sandwich", "fruit"),
    "apple": (), "orange tree": (), "banana": (), "hot dog": (),
}  # fmt: skip
"""Thing -> further words for it."""


def plurals(word: str) -> tuple[str, ...]:
    """The word and its regular plurals: "bus" -> bus, buses; "pony" -> pony, ponies; "dog" -> dog, dogs."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word, f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word, f"{word}s", f"{word[:-1]}ies"
    return word, f"{word}s"


class Words:
    """A vocabulary that is looked for in texts: thing -> its words, the thing's own name among them."""

    def __init__(self, things: Mapping[str, Iterable[str]]) -> None:
        self.things = tuple(things)
        self._of = {form: thing for thing, more in things.items() for word in (thing, *more) for form in plurals(word)}
        ordered = sorted(self._of, key=len, reverse=True)
        self._pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, ordered)) + r")\b") if ordered else None

    def named(self, text: str) -> list[str]:
        """The things that the text names, each once, in the order in which they come."""
        if self._pattern is None:
            return []
        return list(dict.fromkeys(self._of[m.group()] for m in self._pattern.finditer(text.lower())))


@lru_cache(maxsize=1)
def everyday() -> Words:
    """:data:`THINGS`, ready to be looked for."""
    return Words(THINGS)
