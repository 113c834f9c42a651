"""What the bundled mini-LLaVA can be asked about a rendered character, and the answers it was taught: templates over the scene's truth."""

from __future__ import annotations

import numpy as np

from mllm_fl.data.glyphs import Scene

CAPTION = ("describe the picture briefly .", "what is in the picture ?")
DETAIL = ("describe the picture in detail .", "give a full description of the picture .")
CONVERSATION = (
    "which character is this ?",
    "is it a digit or a letter ?",
    "how thick is the stroke ?",
    "which way does it lean ?",
    "is it narrow or wide ?",
)
REASONING = (
    "which other character could it be taken for , and why ?",
    "what could a reader mistake it for ? explain .",
)
QUESTIONS: dict[str, tuple[str, ...]] = {
    "caption": CAPTION, "conversation": CONVERSATION, "detail": DETAIL, "reasoning": REASONING,
}  # fmt: skip

LEANS = {"left": "leans to the left", "upright": "stands upright", "right": "leans to the right"}
_LOOKALIKE = {  # character -> what it is taken for, and what both have
    "0": ("D", "both are one closed curve"), "1": ("7", "both are one long stroke that goes down"), "2": ("Z", "both end in a flat line below"),
    "3": ("8", "both have two curves , one above the other"), "4": ("9", "both have a closed shape above a long stroke"),
    "5": ("S", "both turn from one side to the other"), "6": ("8", "both have a closed curve below"), "7": ("1", "both are one long stroke that goes down"),
    "8": ("B", "both have two closed curves , one above the other"), "9": ("4", "both have a closed shape above a long stroke"),
    "A": ("4", "both have a line across the middle"), "B": ("8", "both have two closed curves , one above the other"),
    "C": ("G", "both are one open curve"), "D": ("0", "both are one closed curve"), "E": ("F", "both have lines across at the top and the middle"),
    "F": ("P", "both have a long stroke on the left"), "G": ("C", "both are one open curve"), "H": ("N", "both have two long strokes"),
    "J": ("U", "both turn at the bottom"), "K": ("X", "both have strokes that meet in the middle"), "L": ("C", "both are open to the right"),
    "M": ("N", "both have two long strokes"), "N": ("H", "both have two long strokes"), "P": ("F", "both have a long stroke on the left"),
    "Q": ("0", "both are one closed curve"), "R": ("P", "both have a closed curve above"), "S": ("5", "both turn from one side to the other"),
    "T": ("7", "both have a line at the top and one long stroke"), "U": ("V", "both are open at the top"), "V": ("Y", "both are open at the top"),
    "W": ("M", "both have four strokes"), "X": ("K", "both have strokes that meet in the middle"), "Y": ("V", "both are open at the top"),
    "Z": ("2", "both end in a flat line below"),
}  # fmt: skip
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def full_name(character: str) -> str:
    """``"7"`` -> ``"the digit seven"``, ``"A"`` -> ``"the letter a"``."""
    return f"the digit {_NAMES[int(character)]}" if character.isdigit() else f"the letter {character.lower()}"


def answer(scene: Scene, question: str) -> str:
    """The true answer to one of :data:`QUESTIONS`, in the words that the model was taught."""
    name, lean = full_name(scene.character), LEANS[scene.posture]
    if question in CAPTION:
        return f"{name} , {scene.weight} , {lean} ."
    if question in DETAIL:
        return (
            f"the picture shows {name} . it is drawn in light on dark with a {scene.weight} stroke . "
            f"it {lean} and its width is {scene.proportion} ."
        )
    if question in REASONING:
        other, why = _LOOKALIKE[scene.character]
        return f"it is {name} . it could be taken for {full_name(other)} , because {why} ."
    return {
        CONVERSATION[0]: f"it is {name} .",
        CONVERSATION[1]: f"it is a {scene.kind} .",
        CONVERSATION[2]: f"the stroke is {scene.weight} .",
        CONVERSATION[3]: f"it {lean} .",
        CONVERSATION[4]: f"its width is {scene.proportion} .",
    }[question]


CLIP_TEMPLATES = (
    "a photo of the {kind} {name}",
    "the {kind} {name}",
    "a picture of the {kind} {name} , {weight}",
    "{weight} {kind} {name} that {lean}",
    "a handwritten {kind} {name}",
)
ZERO_SHOT = ("a photo of the digit {}", "the digit {}", "a handwritten digit {}")


def clip_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption of a scene for contrastive training; digits go by name or by figure."""
    name = scene.character.lower()
    if scene.character.isdigit() and rng.random() < 0.5:
        name = _NAMES[int(scene.character)]
    template = CLIP_TEMPLATES[int(rng.integers(len(CLIP_TEMPLATES)))]
    return template.format(kind=scene.kind, name=name, weight=scene.weight, lean=LEANS[scene.posture])


def vocabulary() -> list[str]:
    """Every word that captions, questions and answers can hold, sorted."""
    texts = (
        [q for qs in QUESTIONS.values() for q in qs]
        + [w for _, w in _LOOKALIKE.values()]
        + list(CLIP_TEMPLATES)
        + list(ZERO_SHOT)
    )
    texts += list(LEANS.values()) + list(_NAMES) + [c.lower() for c in _LOOKALIKE] + [full_name(c) for c in _LOOKALIKE]
    texts += ["user : assistant :", "thin medium bold narrow normal wide digit letter", "i o"]
    texts += [
        "the picture shows . it is drawn in light on dark with a stroke . it and its width is .",
        "it could be taken for , because",
    ]
    words = {w for t in texts for w in t.split() if "{" not in w}
    return sorted(words)
