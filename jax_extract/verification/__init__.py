"""Whether a run is what it says: its bytes read again, samples of it computed again by an independent reference."""
