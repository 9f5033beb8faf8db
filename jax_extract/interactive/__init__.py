"""What a notebook holds: a loaded model, what it is asked, and what it says."""
