"""A stand-in for triton."""

from anything import stand_in

stand_in(__name__, "3.9.0")
