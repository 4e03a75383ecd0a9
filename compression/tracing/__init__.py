"""Which channels of a network belong together: a trace, the channel groups it finds, masks, and the proofs of a cut."""
