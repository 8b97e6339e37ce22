"""Property-based tests: cases of every primitive and of whole blocks, drawn by hypothesis, each held to a bound derived for it.

A case is plain numbers and names, so that a failure prints as what `kept.py` keeps. Bounds are those of rounding: with u the unit
roundoff of the arithmetic, a sum of n terms is off by at most about n u times the sum of their magnitudes, in whatever order it was
taken, and a result by half an ulp more where it is stored. No number of cases exceeds them by chance.

    python -m fuzz --minutes 10 --seed 3     in this folder's parent; `make fuzz ARGS="--minutes 10 --seed 3"`
"""
