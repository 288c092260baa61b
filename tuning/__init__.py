"""How a sweep runs: Ray Tune, searchers, schedulers, seeds, MLflow, curves, resume, the command line."""
