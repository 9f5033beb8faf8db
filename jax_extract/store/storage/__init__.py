"""Places that keep files, behind one set of verbs: a local directory and a bucket."""
