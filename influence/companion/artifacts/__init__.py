"""The artifacts: each module computes, judges and draws what the notebook of its name shows."""
