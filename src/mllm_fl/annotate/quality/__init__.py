"""Is this corpus to be trusted? Checks of its pictures and of its texts, each *ok*, *failed* or *not checked*; nothing is dropped silently."""
