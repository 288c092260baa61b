"""How one trial learns: one package a model family, pure functions of one lane (see `trainables.family`)."""
