"""One model, a pipeline with a planted bug, what the model says, and what graphprobe says."""
