"""What to try: one module a family, every sweep of its notebook by name (see `search_spaces.space`, `.sweeps`)."""
