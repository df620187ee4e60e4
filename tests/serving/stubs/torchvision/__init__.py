"""A stand-in for torchvision."""

from anything import stand_in

stand_in(__name__, "0.28.0")
