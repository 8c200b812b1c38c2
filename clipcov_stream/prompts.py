"""How the classes of public evaluation sets are said: sentences, and names where the data itself has none that read.

ImageNet's names and its 80 sentences are open_clip's, which are the CLIP paper's. The others are this project's own:
three or four plain sentences a set, so figures differ somewhat from those with the CLIP paper's prompt ensembles.
"""

from __future__ import annotations

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

IMAGENET_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)

PHOTO = ("a photo of a {}.", "a picture of the {}.", "a close view of a {}.", "this is what a {} looks like.")
"""Sentences for any object."""

TINY = ("a photo of a {}.", "a tiny photo of a {}.", "a blurred picture of the {}.", "a {} in low resolution.")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "caltech101": PHOTO,
    "cifar10": TINY,
    "cifar100": TINY,
    "dtd": ("a photo of a {} surface.", "a {} texture.", "something with a {} pattern."),
    "fgvc_aircraft": ("a photo of a {} aircraft.", "a {}, a kind of airplane.", "a {} on the ground or in flight."),
    "flowers102": ("a photo of a {}, a kind of flower.", "a {} in bloom.", "a close view of a {} flower."),
    "food101": ("a photo of {}, a dish.", "a plate of {}.", "{}, ready to be eaten."),
    "gtsrb": ("a photo of a traffic sign: {}.", "a road sign that means {}.", "a {} sign beside a German road."),
    "oxford_pets": ("a photo of a {}, a breed of pet.", "a {} at home.", "a portrait of a {}, an animal."),
    "rendered_sst2": ("a {} review of a film.", "the text of a {} opinion.", "words that say something {}."),
    "stanford_cars": ("a photo of a {}, a car.", "a {} parked outside.", "an advertisement for a {}."),
    "stl10": PHOTO,
    "svhn": ('a photo of the house number "{}".', 'the digit "{}" on a wall.', 'a blurred number "{}" in the street.'),
}

DIGITS = tuple("0123456789")

CALTECH101: dict[str, str] = {
    "Faces": "person seen from the shoulders up",
    "Faces_easy": "human face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "car seen from the side",
    "cougar_body": "body of a cougar",
    "cougar_face": "face of a cougar",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "water_lilly": "water lily",
    "yin_yang": "yin and yang symbol",
}
"""Folder -> name, where the folder's own name with spaces for underscores would not do."""

GTSRB = (
    *(f"speed limit {kmh} km/h" for kmh in (20, 30, 50, 60, 70, 80)),
    "end of the 80 km/h speed limit",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no overtaking",
    "no overtaking for trucks",
    "right of way at the next crossing",
    "priority road",
    "give way",
    "stop",
    "closed to all vehicles",
    "closed to trucks",
    "no entry",
    "danger ahead",
    "bend to the left",
    "bend to the right",
    "double bend",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights ahead",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "snow or ice",
    "wild animals crossing",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "straight on only",
    "straight on or right",
    "straight on or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking for trucks",
)
"""By class id."""


def spoken(name: str) -> str:
    """A folder's or label's name as words."""
    return name.replace("_", " ").strip()
