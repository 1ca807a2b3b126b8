"""`suasion chat RUN`: the same message to any of a run's models, side by side; `talk.py` holds the conversation, in terminal and page alike."""
