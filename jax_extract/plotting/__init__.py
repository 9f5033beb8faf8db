"""Pictures of runs and trainings: reading apart from drawing, one picture a file."""
