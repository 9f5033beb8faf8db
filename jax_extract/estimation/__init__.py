"""What a run will cost, from a short timed probe and from what its plan says."""
