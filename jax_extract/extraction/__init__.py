"""From a request to committed parts: the job, the compiled program, the loop, the session, and who computes what."""
