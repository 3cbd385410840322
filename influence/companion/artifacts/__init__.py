"""The artifacts: each module computes, judges and draws what the notebook of its name shows.

What the parameters of a run mean is said in that notebook's cell of parameters. Images are drawn by the seed of the
network that is scored; networks that are continued by several arms are all tested on the same ones.
"""
