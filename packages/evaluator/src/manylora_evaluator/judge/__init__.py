"""A language model as the judge of answers, and how far it can be trusted."""
