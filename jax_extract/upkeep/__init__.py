"""Looking after a run that is there: what it holds, what is missing, what can go, and its way to a bucket."""
