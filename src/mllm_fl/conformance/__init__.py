"""Whether a method is sound: one suite for those of this package and for a stranger's class, as a library."""
