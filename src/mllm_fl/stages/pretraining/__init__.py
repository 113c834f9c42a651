"""Stage 1b in parts: what may be asked, how alpha and the learning rate move, the corpus as a stream, checks before, the step, many processes."""
